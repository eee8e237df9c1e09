"""Rung 2 as a whole, from an HF Qwen3 and a GPT-OSS donor in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.vpmoe.upcycle.tiny_vocabularies import compact_vocabulary, dataset_of, write_donor, write_model
from vpmoe.errors import UpcycleError
from vpmoe.upcycle import runner
from vpmoe.upcycle.registry import Registry, load_registry

PADDED = 384
OBJECTS = """
[model_hf]
kind = "source"
rung = 0
path = "{root}/model_hf"
[donor_hf]
kind = "source"
rung = 0
path = "{root}/donor_hf"
partial = true
"""
DERIVED = """
[{id}]
kind = "derived"
rung = {rung}
path = "{root}/{id}"
config = "{repository}/configs/qwen3_0_6b.yaml"
job = "{root}/{id}.toml"
inputs = {inputs}
[{id}.overrides]
num_layers = 1
hidden_size = 32
ffn_hidden_size = 80
num_attention_heads = 4
num_query_groups = 2
kv_channels = 16
padded_vocab_size = {padded}
untie_embeddings_and_output_weights = {untied}
"""
JOB = """
object = "new"
job = "vocabulary"
[settings]
method = "omp"
k = 5
batch_size = 32
eos_tokens = ["<|return|>"]
texts = ["the ship was bound for another harbour"]
[settings.special_rows]
"<|start|>" = ["<|im_start|>"]
"<|end|>" = ["<|im_end|>"]
"<|return|>" = ["<|im_end|>"]
"<|message|>" = [" ", "1"]
"""


def write_registry(root: Path, repository: Path, *, untied: bool, padded: int = PADDED) -> Registry:
    shared = {"root": root, "repository": repository, "untied": str(untied).lower()}
    text = OBJECTS.format(root=root)
    text += DERIVED.format(id="old", rung=1, inputs='{ source = "model_hf" }', padded=340, **shared)
    text += DERIVED.format(id="new", rung=2, inputs='{ model = "old", donor = "donor_hf" }', padded=padded, **shared)
    (root / "objects.toml").write_text(text)
    (root / "old.toml").write_text(
        'object = "old"\njob = "import_qwen3"\n[settings]\nprompt_lengths = [3]\ngreedy_steps = 1\n'
    )
    (root / "new.toml").write_text(JOB)
    return load_registry(root / "objects.toml")


def climb(registry: Registry) -> dict:
    receipts = [runner.run(runner.plan(registry, spec.id), quiet=True) for spec in registry.chain("new")]
    return receipts[-1]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_rung(tmp_path: Path, repository: Path, tied: bool) -> None:
    write_model(tmp_path / "model_hf", tie_word_embeddings=tied)
    write_donor(tmp_path / "donor_hf")
    registry = write_registry(tmp_path, repository, untied=not tied)
    receipt = climb(registry)
    found = receipt["verification"]
    assert found["other_tensors_bit_identical"] and found["tied"] == tied
    assert {entry["text"] for entry in found["texts"]} >= {"1234567890", "1/3 = 0.333..."}
    assert all(entry["tokens"]["after"] > 0 for entry in found["texts"])

    old = load_file(tmp_path / "model_hf" / "model.safetensors")
    new = load_file(tmp_path / "new" / "hf" / "model.safetensors")
    assert ("lm_head.weight" in new) != tied
    source, donor = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("model_hf", "donor_hf"))
    for name in ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"]):
        before, after = old[name], new[name]
        assert after.shape == (PADDED, 32)
        start, shared = (donor.convert_tokens_to_ids(token) for token in ("<|start|>", "Ġthe"))
        assert torch.equal(after[start], before[source.convert_tokens_to_ids("<|im_start|>")])
        assert torch.equal(after[shared], before[source.convert_tokens_to_ids("Ġthe")])
        mean = before.double().mean(0).float()
        assert torch.equal(after[len(donor) :], mean.expand(PADDED - len(donor), -1))
    figures = receipt["report"]["embedding.word_embeddings.weight"]
    assert figures["rows_copied"] + figures["rows_approximated"] + figures["rows_padding"] == PADDED

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "hf")
    end = donor.convert_tokens_to_ids("<|return|>")
    assert model.generation_config.eos_token_id == [end]
    assert json.loads((tmp_path / "new" / "hf" / "config.json").read_text())["vocab_size"] == PADDED


def test_a_donor_with_a_compact_vocabulary(tmp_path: Path, repository: Path) -> None:
    """The reference is then the dataset that has this vocabulary; another one's is refused."""
    write_model(tmp_path / "model_hf")
    write_donor(tmp_path / "donor_hf", vocabulary=compact_vocabulary(280))
    for name, size in (("own", 280), ("other", 290)):
        dataset_of(tmp_path / name, compact_vocabulary(size))
    registry = write_registry(tmp_path, repository, untied=False)
    job = JOB.replace("k = 5", f'k = 5\nlargest_norm_ratio = 1e9\nreference = "{tmp_path}/other"')
    job = job.replace('"1"]', '"1"]\n"<|call|>" = ["<|im_end|>"]')
    (tmp_path / "new.toml").write_text(job)
    with pytest.raises(UpcycleError, match="the donor's tokenizer is not o200k_harmony_compact"):
        climb(registry)
    (tmp_path / "new.toml").write_text(job.replace("/other", "/own"))
    receipt = climb(registry)
    figures = receipt["report"]["embedding.word_embeddings.weight"]
    assert figures["rows_copied"] >= 256 and figures["rows_padding"] == PADDED - 280
    after = AutoTokenizer.from_pretrained(tmp_path / "new" / "hf", trust_remote_code=True)
    text = "the ship was bound for 12345"
    assert after(text)["input_ids"] == compact_vocabulary(280).encode_ordinary(text).tolist()


def test_what_cannot_be(tmp_path: Path, repository: Path) -> None:
    write_model(tmp_path / "model_hf")
    write_donor(tmp_path / "donor_hf")
    registry = write_registry(tmp_path, repository, untied=False)
    job = tmp_path / "new.toml"
    runner.run(runner.plan(registry, "old"), quiet=True)

    job.write_text(JOB.replace('eos_tokens = ["<|return|>"]', 'eos_tokens = ["<|stop|>"]'))
    with pytest.raises(UpcycleError, match=r"not in the donor's vocabulary: \['<\|stop\|>'\]"):
        climb(registry)
    job.write_text(JOB.replace("k = 5", "k = 5\nlargest_norm_ratio = 1.001"))
    with pytest.raises(UpcycleError, match="has norm"):
        climb(registry)
    job.write_text(JOB.replace("k = 5", 'k = 5\nreference = "o200k_harmony"\nlargest_norm_ratio = 1e9'))
    with pytest.raises(UpcycleError, match="the donor's tokenizer is not o200k_harmony"):
        climb(registry)
    job.write_text(JOB)
    with pytest.raises(UpcycleError, match="the declared geometry 264 rows"):
        climb(write_registry(tmp_path, repository, untied=False, padded=264))
    assert not (tmp_path / "new").exists()
