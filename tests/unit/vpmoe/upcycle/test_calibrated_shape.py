"""Rung 3, calibrated: exact where it can be, else better than the plain conversion; restartable; honest about texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.files import read_record, write_record
from tests.fixtures_dataset import PADDED_VOCAB, small_dataset
from tests.tiny import tiny_config
from tests.unit.vpmoe.upcycle.test_shape import DIM, HIDDEN, NEW, OLD
from tests.unit.vpmoe.upcycle.tiny_rungs import TEXT, make, object_of, random_weights
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.inputs import Input
from vpmoe.upcycle.job import Task
from vpmoe.upcycle.ladder_file import ObjectSpec
from vpmoe.upcycle.passages import Passages, calibration_passages
from vpmoe.upcycle.shape import Shape, convert_blocks
from vpmoe.upcycle.shape_settings import ShapeSettings
from vpmoe.weights import LazyTensor

VOCABULARY = {"padded_vocab_size": PADDED_VOCAB}
BOTH = ("attention", "feed_forward")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "set")


def _silent(_what: str, _size: int) -> None:
    return


def _convert(
    scratch: Path, weights: dict[str, LazyTensor], dataset: Path, progress: Any = _silent, **settings: Any
) -> dict[str, LazyTensor]:
    chosen = ShapeSettings.model_validate({"calibration": str(dataset), "steps": 6, "batch_tokens": 256, **settings})
    passages = Passages.of_dataset(dataset, "train", 900, longest=48, padded_vocab_size=PADDED_VOCAB, seed=chosen.seed)
    rungs = (_old(), weights), tiny_config(**{**NEW, **VOCABULARY})
    scratch.mkdir(exist_ok=True)
    found, _ = convert_blocks(*rungs, chosen, passages, scratch, source="test", progress=progress)
    return found


def _old() -> RunConfig:
    return tiny_config(**{**OLD, **VOCABULARY})


def _turned_copies(weights: dict[str, LazyTensor]) -> None:
    """Make odd groups copies of the even ones, keys and queries turned within RoPE's pairs, values mapped; no copies of
    queries in a group but those that are merged."""
    generator = torch.Generator().manual_seed(3)
    for index in (0, 1):
        name = f"decoder.layers.{index}.self_attention."
        mixed = weights[f"{name}linear_qkv.weight"].read().view(4, 4, DIM, HIDDEN).clone()
        output = weights[f"{name}linear_proj.weight"].read().view(HIDDEN, 4, 2, DIM).clone()
        angle = torch.rand(DIM // 2, generator=generator) * 6
        a, b = mixed[::2, :3].chunk(2, 2)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        mixed[:, 1] = mixed[:, 0]
        mixed[1::2, :3] = torch.cat([a * cos - b * sin, b * cos + a * sin], 2)
        mixed[::2, 1], mixed[1::2, 1] = mixed[::2, 0], mixed[1::2, 0]
        values = torch.randn(DIM, DIM, generator=generator)
        mixed[1::2, 3] = values @ mixed[::2, 3]
        weights[f"{name}linear_qkv.weight"] = LazyTensor.of(mixed.view(-1, HIDDEN))
        weights[f"{name}linear_proj.weight"] = LazyTensor.of(output.flatten(1))
        for norm in ("q_layernorm.weight", "k_layernorm.weight"):
            half = weights[f"{name}{norm}"].read()[: DIM // 2]
            weights[f"{name}{norm}"] = LazyTensor.of(half.repeat(2))


@pytest.mark.slow
def test_groups_that_are_turned_copies_are_merged_without_loss(tmp_path: Path, dataset: Path) -> None:
    """The start alone is exact already: the plain means are not."""
    weights = random_weights(_old())
    _turned_copies(weights)
    below = object_of(tmp_path, "below", _old(), weights)
    new = tiny_config(**{**NEW, **VOCABULARY})
    chosen = {"calibration": str(dataset), "feed_forward": "l2_topk", "steps": 0}
    report, _ = make(tmp_path, "shape", new, below, **chosen)
    assert report["conversion"]["calibration_error"]["1"]["attention"]["start"] < 1e-5
    for number, errors in report["verification"]["relative_output_error"]["after"].items():
        plain = report["verification"]["relative_output_error"]["plain"][number]
        assert plain["attention"] > 0.1 and plain["feed_forward"] == errors["feed_forward"] > 0.1
    assert report["verification"]["relative_output_error"]["after"]["1"]["attention"] < 1e-4


@pytest.mark.slow
def test_it_beats_the_plain_conversion_on_held_out_text(tmp_path: Path, dataset: Path) -> None:
    weights = random_weights(_old())
    below = object_of(tmp_path, "below", _old(), weights)
    new = tiny_config(**{**NEW, **VOCABULARY})
    report, written = make(tmp_path, "shape", new, below, calibration=str(dataset), steps=30, batch_tokens=512)
    found, report = report["verification"], report["conversion"]
    for errors in report["calibration_error"].values():
        for part in BOTH:
            stages = dict(errors[part])
            assert stages.pop("kept") == min(stages.values()) < stages["start"]
    mean = {
        name: [sum(layer[part] for layer in layers.values()) for part in BOTH]
        for name, layers in found["relative_output_error"].items()
    }
    assert all(after < 0.8 * plain for after, plain in zip(mean["after"], mean["plain"], strict=True))
    assert found["scored_tokens"] < found["heldout_tokens"] < report["calibration_tokens"]
    assert set(found["loss"]) == {"before", "plain", "after"}
    assert torch.equal(written["output_layer.weight"].read(), weights["embedding.word_embeddings.weight"].read())


@pytest.mark.slow
def test_an_interrupted_conversion_goes_on_and_gives_the_same(tmp_path: Path, dataset: Path) -> None:
    weights = random_weights(_old())
    whole = _convert(tmp_path / "whole", weights, dataset)

    class Stopped(Exception):
        pass

    def stop(what: str, size: int) -> None:
        assert size > 0
        raise Stopped(what)

    with pytest.raises(Stopped, match="layer 1"):
        _convert(tmp_path / "stopped", weights, dataset, progress=stop)
    files = sorted((tmp_path / "stopped").glob("layer_*"))
    written = files[0].stat().st_mtime_ns
    resumed = _convert(tmp_path / "stopped", weights, dataset)
    assert len(files) == 1 and files[0].stat().st_mtime_ns == written
    assert all(torch.equal(tensor.read(), resumed[name].read()) for name, tensor in whole.items())
    other = _convert(tmp_path / "seed", weights, dataset, seed=1)
    assert not torch.equal(
        other["decoder.layers.0.mlp.linear_fc1.weight"].read(), whole["decoder.layers.0.mlp.linear_fc1.weight"].read()
    )


def test_an_edited_dataset_is_another_object(dataset: Path) -> None:
    settings = ShapeSettings(calibration=str(dataset))
    spec = ObjectSpec(id="shaped", rung=3, path="shaped", job="shape")
    before = Shape().decides(spec, settings)
    manifest = dataset / "manifest.json"
    content = read_record(manifest)
    write_record(manifest, {**content, "git": {"sha": "another commit"}})
    assert Shape().decides(spec, settings) == before
    write_record(manifest, {**content, "seq_length": content["seq_length"] + 1})
    assert Shape().decides(spec, settings) != before


@pytest.mark.parametrize("asked", [2, 3, 47, 100, 333])
def test_never_more_tokens_than_asked_for(dataset: Path, asked: int) -> None:
    """The last passage is cut; one token alone, too few for a passage, may be missing."""
    chosen = {"calibration": str(dataset), "calibration_tokens": asked, "heldout_tokens": asked, "text_tokens": 40}
    spec, cfg = ObjectSpec(id="x", rung=3, path="x", job="shape"), tiny_config(**{**NEW, **VOCABULARY})
    task = Task(spec, cfg, {"model": Input(spec, cfg, {}, None)}, ShapeSettings.model_validate(chosen), Path(), _silent)
    passages = Passages.of_dataset(dataset, "valid", asked, longest=40, padded_vocab_size=PADDED_VOCAB, seed=1)
    for found in (calibration_passages(task), passages):
        assert found.num_tokens <= asked and (found is passages or found.num_tokens >= asked - 1)
        for tokens, marks in zip(found.tokens, found.scored, strict=True):
            assert 2 <= len(tokens) == len(marks) <= 40 and not marks[-1]


def test_texts_that_do_not_do_are_refused(tmp_path: Path, dataset: Path) -> None:
    below = object_of(tmp_path, "below", tiny_config(**OLD), random_weights(tiny_config(**OLD)))
    with pytest.raises(UpcycleError, match=r"12 calibration tokens; 132 are needed"):
        make(tmp_path, "shape", tiny_config(**NEW), below, calibration_texts=[TEXT], texts=["other"], text_tokens=12)
    for settings, message in (
        ({"texts": [TEXT]}, "name calibration or calibration_texts"),
        ({"texts": [TEXT], "calibration_texts": [TEXT]}, "also calibrates"),
        ({"calibration": "x", "calibration_texts": [TEXT]}, "one of the two"),
        ({"calibration_texts": [TEXT]}, "nothing to measure on"),
    ):
        with pytest.raises(ValidationError, match=message):
            ShapeSettings.model_validate(settings)
