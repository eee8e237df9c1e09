"""Experts of three runs over one embedding become a mixture, which trains through the loop, resumes bit for bit and
loads without them; in bf16 as in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.generation.state_decoder import StateDecoder, decoder_of
from megatron_vpmoe.model.attention.masks import left_padded
from megatron_vpmoe.runtime.distributed import single_process
from megatron_vpmoe.think.recall import store_of
from tests import training_runs
from tests.fixtures_dataset import small_dataset
from vpmoe.weights.geometry import load_model
from vpmoe.weights.megatron_checkpoint import read_config, read_weights

pytestmark = pytest.mark.slow

PLAIN: dict[str, Any] = {
    **training_runs.PLAIN,
    "ssm_inner_size": 48,
    "ssm_step_rank": 4,
    "diffusion_levels": 20,
    "ddim_steps": 4,
    "train_iters": 4,
    "save_interval": 4,
}
FROZEN = {"train_only": '["decoder.*"]'}
KINDS = ("transformer", "state_space", "denoiser")
MIXTURE: dict[str, Any] = {
    **PLAIN,
    "layer_type": "mixture",
    "mixture_experts": [{"layer_type": kind, "num_layers": 2} for kind in KINDS],
    "kv_lora_rank": 12,
    "qk_pos_emb_head_dim": 4,
    "ddim_steps": 2,
    "objective": "mixture_ce",
    "mixture_entropy_coeff": 0.1,
    "train_only": '["decoder.latent_attention.*", "decoder.router.*", "decoder.adapters.*"]',
    "train_iters": 6,
    "save_interval": 3,
    "eval_interval": 3,
}
EMBEDDING, ADAPTER = "embedding.word_embeddings.weight", "decoder.adapters.transformer.weight"


def trained(run: Path, dataset: Path, **changes: Any) -> str:
    done = training_runs.train(run, dataset, **changes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def experts(folder: Path, dataset: Path, **changes: Any) -> list[Path]:
    transformer, state_space, denoiser = runs = [folder / kind for kind in KINDS]
    trained(transformer, dataset, **PLAIN, **changes, objective="token_ce")
    shared = {**PLAIN, **changes, **FROZEN, "load_embedding": transformer}
    trained(state_space, dataset, **shared, layer_type="state_space", objective="token_ce")
    trained(denoiser, dataset, **shared, layer_type="denoiser", objective="denoising")
    return runs


def interrupted_at_half(straight: Path, resumed: Path) -> None:
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "iter_0000006")
    (resumed / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")


def check_decoding_in_bf16(checkpoint: Path) -> None:
    """A text begun in one pass and continued token by token is that of one pass, but for what bf16 takes from both."""
    weights, ids, begun = read_weights(checkpoint), torch.arange(1, 41)[None], 25
    with single_process(seed=1), torch.no_grad():
        narrow, wide = (
            load_model(read_config(checkpoint, bf16=bf16), weights, source=str(checkpoint)) for bf16 in (True, False)
        )
        whole, exact = (model(*left_padded(ids.tolist(), model.device)).logits()[0].float() for model in (narrow, wide))
        decoder = decoder_of(narrow, packed=False)
        assert isinstance(decoder, StateDecoder)
        cache = decoder.cache(1)
        cache.reserve(ids.shape[1])
        [past] = decoder.pasts(*left_padded(ids[:, :begun].tolist(), narrow.device), [slice(0, begun)])
        cache.fill(0, past)
        steps = [decoder.step(ids[:, at], torch.tensor([at]), cache, at + 1) for at in range(begun, ids.shape[1])]
    lost = (whole - exact)[begun:].norm()
    assert 0 < lost < 0.02 * exact[begun:].norm()
    assert (torch.cat(steps) - whole[begun:]).norm() < 2 * lost


def test_in_bf16_from_its_experts_to_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "set", train=100)
    runs = experts(tmp_path, dataset, bf16=True)
    straight, resumed, onward = (tmp_path / name for name in ("straight", "resumed", "onward"))
    mixture = {**MIXTURE, "bf16": True}
    named = json.dumps([str(run) for run in reversed(runs)])
    told = trained(straight, dataset, **mixture, load_experts=named)
    assert all(f"expert {kind} from {run}" in told for kind, run in zip(KINDS, runs, strict=True))
    losses, measured = training_runs.losses(straight), training_runs.measured(straight)
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert measured[6, "valid/loss/total"] == measured[6, "valid/loss/ce"] < measured[3, "valid/loss/ce"]
    for split in ("", "valid/"):
        assert sum(measured[6, f"{split}routing/{kind}"] for kind in KINDS) == pytest.approx(1, abs=1e-5)
        assert all(0 < measured[6, f"{split}routing/{kind}/std"] < 0.5 for kind in KINDS)
    for step, coefficient in {1: 0.1, 6: 0.0}.items():
        assert measured[step, "routing/entropy_coeff"] == pytest.approx(coefficient)
        less = measured[step, "loss/ce"] - coefficient * measured[step, "routing/entropy"]
        assert measured[step, "loss/total"] == pytest.approx(less, abs=1e-5)

    ours = training_runs.checkpoint_tensors(straight / "checkpoints" / "iter_0000006")
    weights = {key: tensor for key, tensor in ours.items() if not key.startswith("optimizer")}
    for kind, run in zip(KINDS, runs, strict=True):
        stored = training_runs.checkpoint_tensors(run / "checkpoints" / "iter_0000004")
        begin = f"decoder.experts.{kind}." + ("" if kind == "denoiser" else "stack.")
        for key, tensor in stored.items():
            if not key.startswith("optimizer"):
                assert torch.equal(weights[key if key == EMBEDDING else begin + key.removeprefix("decoder.")], tensor)
    moments = {key for key in ours if key.startswith("optimizer")}
    assert any("adapters" in key for key in moments)
    assert not any(name in key for key in moments for name in (EMBEDDING, "decoder.experts."))
    assert {tensor.dtype for key, tensor in ours.items() if key in moments} == {torch.float32}
    assert {weights[key].dtype for key in (EMBEDDING, ADAPTER)} == {torch.bfloat16}
    check_decoding_in_bf16(straight / "checkpoints" / "iter_0000006")

    for run in runs:
        shutil.rmtree(run)
    interrupted_at_half(straight, resumed)
    trained(resumed, dataset, **mixture, load_experts=named, resume=True)
    assert training_runs.losses(resumed) == losses and training_runs.measured(resumed) == measured
    again = training_runs.checkpoint_tensors(resumed / "checkpoints" / "iter_0000006")
    assert [key for key in ours if not torch.equal(ours[key], again[key])] == []

    trained(onward, dataset, **{**mixture, "train_iters": 3, "eval_at_start": True}, load_weights=straight)
    started = training_runs.measured(onward)
    assert started[0, "valid/loss/ce"] == measured[6, "valid/loss/ce"]


def test_with_a_store_it_resumes_bit_for_bit_and_only_with_that_store(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "set", train=100)
    first, straight, resumed, plain = (tmp_path / name for name in ("first", "straight", "resumed", "plain"))
    trained(first, dataset, **{**PLAIN, "train_iters": 3}, objective="token_ce")
    table = training_runs.checkpoint_tensors(first / "checkpoints" / "iter_0000003")[EMBEDDING]
    split = KDDataset.open(dataset, "train", seq_length=48, padded_vocab_size=64)
    documents = [split[number].tokens for number in range(len(split))]
    store_of(documents, table, chunk=4).save(tmp_path / "first.store")
    fields = {**MIXTURE, "load_embedding": first, "init_method_std": 0.2}
    reading = {**fields, "memory_entries": 3, "store": tmp_path / "first.store"}
    assert "experts are drawn at random and stay so" in trained(straight, dataset, **reading)
    losses = training_runs.losses(straight)
    trained(plain, dataset, **{**fields, "train_iters": 3, "save_interval": None})
    without = training_runs.losses(plain)
    assert losses[1] == without[1], "the attention adds nothing at first"
    assert losses[3] != without[3]
    interrupted_at_half(straight, resumed)
    trained(resumed, dataset, **reading, resume=True)
    assert training_runs.losses(resumed) == losses
    ours, again = (
        training_runs.checkpoint_tensors(run / "checkpoints" / "iter_0000006") for run in (straight, resumed)
    )
    assert [key for key in ours if not torch.equal(ours[key], again[key])] == []

    store_of(documents[1:], table, chunk=4).save(tmp_path / "first.store", overwrite=True)
    done = training_runs.train(resumed, dataset, **reading, resume=True)
    assert done.returncode != 0 and "store_sha256" in done.stdout + done.stderr
    store_of(documents, table + 1, chunk=4).save(tmp_path / "other.store")
    done = training_runs.train(tmp_path / "other", dataset, **{**reading, "store": tmp_path / "other.store"})
    assert done.returncode != 0 and "another embedding" in done.stdout + done.stderr


def test_experts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "set", train=100)
    two = {**MIXTURE, "mixture_experts": MIXTURE["mixture_experts"][:2]}
    first, second = tmp_path / "first", tmp_path / "second"
    trained(first, dataset, **{**PLAIN, "train_iters": 3}, objective="token_ce")
    trained(second, dataset, **{**PLAIN, "train_iters": 3}, objective="token_ce", layer_type="state_space", seed=5)
    for runs, said in {
        (first, second): "its embedding is another one than that of",
        (first, first): "of a second transformer",
    }.items():
        done = training_runs.train(
            tmp_path / "mixed", dataset, **two, load_experts=json.dumps([str(run) for run in runs])
        )
        assert done.returncode != 0 and said in done.stdout + done.stderr
    done = training_runs.train(
        tmp_path / "mixed", dataset, **{**two, "ssm_inner_size": 40}, load_experts=json.dumps([str(first), str(second)])
    )
    assert done.returncode != 0 and "model.ssm_inner_size: 48 -> 40" in done.stdout + done.stderr


def test_one_process_is_two(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "set", train=100)
    changes = {**MIXTURE, "train_iters": 3, "micro_batch_size": 1, "eval_interval": None, "init_method_std": 0.2}
    for count in (1, 2):
        training_runs.train_in_workers(count, tmp_path / f"by_{count}", dataset, **changes)
    one, two = (training_runs.losses(tmp_path / f"by_{count}") for count in (1, 2))
    assert one == pytest.approx(two, rel=2e-6)
    one, two = (training_runs.measured(tmp_path / f"by_{count}") for count in (1, 2))
    told = [key for key in one if key[1].startswith("routing/")]
    assert {f"routing/{kind}/std" for kind in KINDS} <= {tag for _, tag in told}
    assert [one[key] for key in told] == pytest.approx([two[key] for key in told], rel=1e-4)
