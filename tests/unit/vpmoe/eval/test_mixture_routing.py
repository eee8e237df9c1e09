"""A mixture is asked, talked with and looked into: which experts it trusts at each token."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.files import sha256_of_file
from megatron_vpmoe.generation.exported_step import ExportedStep
from megatron_vpmoe.model.attention.masks import left_padded
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.retrieval.vector_store import VectorStore
from megatron_vpmoe.runtime.distributed import single_process
from megatron_vpmoe.think.mixture_model import MixtureModel
from megatron_vpmoe.training.provenance import collect_provenance
from megatron_vpmoe.training.run import open_run
from tests.tiny import MIXTURE, tiny_config
from vpmoe.app.inspected import routed_html, routing_rows
from vpmoe.cli import main
from vpmoe.eval.inspection import attention_of, layer_numbers, routing_of
from vpmoe.eval.open_model import open_model

NAMES = ("transformer", "state_space", "denoiser")


@pytest.fixture(scope="module")
def mixture_run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of a mixture that has trained for no step, and whose router says something."""
    folder = tmp_path_factory.mktemp("runs") / "mixture"
    fields = {"padded_vocab_size": 448, "seq_length": 192, "data_path": data / "dataset", "run_dir": folder}
    cfg = tiny_config(**{**MIXTURE, **fields, "init_method_std": 0.3})
    with single_process(seed=1):
        run = open_run(cfg)
        run.save()
        run.settle()
        run.source.close()
    return folder


@pytest.mark.slow
def test_sample_prints_the_weights_at_each_token(mixture_run: Path, capsys) -> None:
    assert main(["sample", str(mixture_run), "What is 1 + 2?", "--max-new-tokens", "5", "--routing"]) == 0
    told = capsys.readouterr().out
    assert "transformer  state_space  denoiser" in told
    rows = re.findall(r"^ +(0\.\d{3}) +(0\.\d{3}) +(0\.\d{3})  '", told, re.MULTILINE)
    assert len(rows) == 5 and all(sum(map(float, row)) == pytest.approx(1, abs=2e-3) for row in rows)
    assert len(set(rows)) > 1


@pytest.mark.slow
def test_int8_weights_are_asked_for_and_told(
    mixture_run: Path, run_directory: Path, data: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["What is 1 + 2?", "--max-new-tokens", "5", "--int8"]
    assert main(["sample", str(mixture_run), *words]) == 0
    assert "step 0, int8 weights)" in capsys.readouterr().out
    assert main(["sample", str(run_directory), *words]) == 2
    assert "reads its weights in layouts of oneDNN" in capsys.readouterr().err
    assert main(["sample", str(run_directory), *words[:-1], "--compile"]) == 2
    assert "no way is built to compile its decoding steps" in capsys.readouterr().err
    words = ["eval", "text", str(mixture_run), "--data-path", str(data / "dataset"), "--documents", "3"]
    assert main(words) == main([*words, "--int8"]) == 0
    paths = sorted((tmp_path / "reports" / "eval" / "text").glob("*.json"), key=lambda path: len(path.name))
    assert [path.stem.endswith("_0000000_int8") for path in paths] == [False, True]
    reports = [json.loads(path.read_text()) for path in paths]
    assert [report["checkpoint"].pop("int8", False) for report in reports] == [False, True]
    assert (
        reports[0]["checkpoint"] == reports[1]["checkpoint"]
        and reports[0]["tasks"].keys() == reports[1]["tasks"].keys()
    )
    for name, task in reports[0]["tasks"].items():
        other = reports[1]["tasks"][name]
        assert task["tokens"] == other["tokens"]
        assert 0 < abs(task["nats_per_token"] - other["nats_per_token"]) < 0.02


@pytest.mark.slow
def test_chat_tells_the_mean_weights_of_an_answer(mixture_run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 1 + 2?\n"))
    assert main(["chat", str(mixture_run), "--max-new-tokens", "4"]) == 0
    assert re.search(r"routing: transformer 0\.\d\d, state_space 0\.\d\d, denoiser 0\.\d\d", capsys.readouterr().err)


@pytest.mark.slow
def test_other_models_have_no_weights_to_print(run_directory: Path, capsys) -> None:
    assert main(["sample", str(run_directory), "What is 1 + 2?", "--routing"]) == 2
    assert "mixes no experts by weights" in capsys.readouterr().err


@pytest.mark.slow
def test_a_store_is_made_by_the_command_and_read_in_decoding(
    mixture_run: Path, data: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run over its embedding writes by it; without its file, or with another, it is not opened."""
    store, folder = tmp_path / "data.store", tmp_path / "run"
    words = ["data", "build-store", str(data / "dataset"), "--embedding", str(mixture_run), "--output", str(store)]
    assert main([*words, "--chunk", "8"]) == 0
    told = re.search(r"([\d,]+) vectors of 8 tokens", capsys.readouterr().out)
    assert told and len(VectorStore.load(store)) == int(told[1].replace(",", "")) > 500
    assert main(words) == 2 and "a vector store lies here" in capsys.readouterr().err
    fields = {"padded_vocab_size": 448, "seq_length": 192, "data_path": data / "dataset", "run_dir": folder}
    fields |= {"store": store, "memory_entries": 2, "load_embedding": mixture_run}
    cfg = tiny_config(**{**MIXTURE, **fields, "init_method_std": 0.3})
    with single_process(seed=1):
        run = open_run(cfg)
        with torch.no_grad():
            run.model.get_parameter("decoder.latent_attention.linear_proj.weight").normal_(std=0.3)
        run.save()
        run.settle()
        run.source.close()
    ask, moved = ["sample", str(folder), "What is 1 + 2?", "--max-new-tokens", "20"], tmp_path / "moved.store"
    assert main([*ask, "--logprobs"]) == 0
    with_it = capsys.readouterr().out
    with open_model(folder) as opened:
        model = opened.model
        assert isinstance(model, MixtureModel) and model.recall is not None
        assert len(model.recall.store) == int(told[1].replace(",", ""))
    store.rename(moved)
    assert main(ask) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in (str(store), str(folder), "step 0 was trained with is not there", "--store"))
    assert main([*ask, "--logprobs", "--store", str(moved)]) == 0
    assert capsys.readouterr().out == with_it
    VectorStore(32).save(store)
    assert main(ask) == 2
    assert re.search("this is not the store that .*, step 0 was trained with", capsys.readouterr().err)
    assert main(["sample", str(mixture_run), "a", "--store", str(moved)]) == 2
    assert "reads no store" in capsys.readouterr().err
    _remembers(folder, moved, capsys, monkeypatch)


def _remembers(run: Path, store: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations that have ended go into a file of the user's, and that of the run stays as it is."""
    before, own = store.read_bytes(), store.with_name("own.store")
    held = len(VectorStore.load(store))
    ask = ["sample", str(run), "--store", str(store), "--remember", str(own), "--max-new-tokens"]
    assert main([*ask, "1", "What is 1 + 2?"]) == 0 and "what was cut is not added" in capsys.readouterr().err
    assert len(VectorStore.load(own)) == held
    # what this model draws says nothing: so it says what is valid, and that ends
    chat = ["chat", str(run), "--remember", str(own), "--only-valid", "--max-new-tokens", "24"]
    for word, times in (("1 + 2", 2), ("3 + 4", 1)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"What is {word}?\n/reset\n" * times))
        assert main(chat) == 0
        said = capsys.readouterr().err
        (added,) = re.findall(r"own.store: (\d+) vectors added, ([\d,]+) held", said)
        assert said.count("nothing added") == times - 1
        held += int(added[0])
        assert int(added[0]) > 3 and len(VectorStore.load(own)) == held == int(added[1].replace(",", ""))
    assert store.read_bytes() == before
    assert main([*ask[:-2], str(store), "--max-new-tokens", "1", "a"]) == 2
    assert "it stays as it is" in capsys.readouterr().err and store.read_bytes() == before
    assert not [path for path in store.parent.iterdir() if path.name.startswith(f".{store.name}")]
    with open_model(run, store=own) as opened:
        assert opened.entry["store_sha256"] == sha256_of_file(own)
    with pytest.raises(DataError, match="conversations are added to this store"):
        collect_provenance(tiny_config(**{**MIXTURE, "store": own, "memory_entries": 2}), [])


@pytest.mark.slow
def test_a_checkpoint_opens_alone_and_its_step_is_exported(mixture_run: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "step.pt2"
    words = ["checkpoint", "export-step", str(mixture_run), "--output", str(path)]
    assert main(words) == 0
    told, step = capsys.readouterr().out, ExportedStep.read(path)
    assert re.match(rf"{path}: one step of .*, step 0; a state of [\d,]+ bytes a row and [\d,]+ a token$", told)
    assert main(words) == 2 and "there is a file" in capsys.readouterr().err
    with open_model(mixture_run) as opened:
        model = opened.model
        assert tuple(model.decoder.experts) == NAMES and not model.training
        assert step.model == opened.entry and step.vocab_size == model.vocab_size
        ids, state = [5, 9, 3, 60, 1, 33], step.state(1, 6)
        with torch.no_grad():
            expected = model(*left_padded([ids], torch.device("cpu"))).logits()[0]
        for at, token in enumerate(ids):
            found, state = step.program(torch.tensor([token]), torch.tensor([at]), state)
            torch.testing.assert_close(found[0], expected[at], rtol=1e-4, atol=1e-5)


def test_the_inspector_shows_what_the_pass_computes(single_process: None) -> None:
    torch.manual_seed(3)
    model = build_model(tiny_config(**{**MIXTURE, "init_method_std": 0.3}))
    ids = [5, 9, 3, 60, 1, 33, 33, 8]
    (routing,) = routing_of(model, ids).values()
    with torch.no_grad():
        weights = model(*left_padded([ids], torch.device("cpu"))).expert_weight_BSE[0].numpy()
    dense = np.zeros_like(weights)
    np.put_along_axis(dense, routing.chosen, routing.weight, 1)
    np.testing.assert_allclose(dense, weights, rtol=1e-6)
    np.testing.assert_allclose(routing.load, weights.sum(0), rtol=1e-5)
    assert routing.names == NAMES and (np.diff(routing.weight) <= 0).all()
    pieces = [f"<{one}>" for one in ids]
    assert all(name in routed_html(pieces, routing) for name in NAMES)
    assert routing_rows(pieces, routing)[0]["experts"].startswith(f"{NAMES[routing.chosen[0, 0]]}: ")
    assert layer_numbers(model) == [1, 2]
    assert attention_of(model, ids, 2).weight.shape == (4, 8, 8)
