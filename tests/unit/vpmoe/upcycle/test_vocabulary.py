"""Rung 2 as a whole, from an HF Qwen3 and a GPT-OSS donor in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vpmoe.data.vocabulary_files import read_vocabulary
from megatron_vpmoe.errors import NonFiniteError
from tests.unit.vpmoe.upcycle.tiny_vocabularies import compact_vocabulary, dataset_of, write_donor, write_model
from vpmoe.errors import UpcycleError
from vpmoe.upcycle import runner
from vpmoe.upcycle.ladder_file import Ladder, read_ladder

PADDED = 384
LADDER = """
folder = "{root}"
[objects.model_hf]
rung = 0
[objects.donor_hf]
rung = 0
partial = true
[objects.old]
rung = 1
config = "{repository}/configs/qwen3_0_6b.yaml"
overrides = {{ {geometry}, padded_vocab_size = 340 }}
job = "import_qwen3"
settings = {{ prompt_lengths = [3], greedy_steps = 1 }}
inputs = {{ source = "model_hf" }}
[objects.new]
rung = 2
config = "{repository}/configs/qwen3_0_6b.yaml"
overrides = {{ {geometry}, padded_vocab_size = {padded} }}
job = "vocabulary"
inputs = {{ model = "old", donor = "donor_hf" }}
[objects.new.settings]
{settings}
"""
GEOMETRY = (
    "num_layers = 1, hidden_size = 32, ffn_hidden_size = 80, num_attention_heads = 4, num_query_groups = 2, "
    "kv_channels = 16, untie_embeddings_and_output_weights = "
)
SETTINGS = """
k = 5
batch_size = 32
eos_tokens = ["<|return|>"]
texts = ["the ship was bound for another harbour"]
[objects.new.settings.special_rows]
"<|start|>" = ["<|im_start|>"]
"<|end|>" = ["<|im_end|>"]
"<|return|>" = ["<|im_end|>"]
"<|message|>" = [" ", "1"]
"""


def write_ladder(
    root: Path, repository: Path, *, untied: bool = False, padded: int = PADDED, settings: str = SETTINGS
) -> Ladder:
    geometry = GEOMETRY + str(untied).lower()
    text = LADDER.format(root=root, repository=repository, geometry=geometry, padded=padded, settings=settings)
    (root / "ladder.toml").write_text(text)
    return read_ladder(root / "ladder.toml")


def climb(ladder: Ladder) -> dict:
    """What the last receipt reports; what a refused attempt has left is discarded."""
    made = [runner.run(runner.plan(ladder, spec.id), quiet=True, overwrite=True) for spec in ladder.chain("new")]
    return made[-1]["report"]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_rung(tmp_path: Path, repository: Path, tied: bool) -> None:
    write_model(tmp_path / "model_hf", tie_word_embeddings=tied)
    write_donor(tmp_path / "donor_hf")
    report = climb(write_ladder(tmp_path, repository, untied=not tied))
    found = report["verification"]
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
    figures = report["conversion"]["embedding.word_embeddings.weight"]
    assert figures["rows_copied"] + figures["rows_approximated"] + figures["rows_padding"] == PADDED

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "hf")
    end = donor.convert_tokens_to_ids("<|return|>")
    assert model.generation_config.eos_token_id == [end]
    assert json.loads((tmp_path / "new" / "hf" / "config.json").read_text())["vocab_size"] == PADDED


@pytest.mark.slow
def test_a_donor_with_a_compact_vocabulary(tmp_path: Path, repository: Path) -> None:
    """The reference is then the dataset that has this vocabulary; another one's is refused."""
    write_model(tmp_path / "model_hf")
    write_donor(tmp_path / "donor_hf", vocabulary=compact_vocabulary(280))
    (tmp_path / "donor_hf" / "vocabulary.json").unlink()  # as one that is not of ours
    for name, size in (("own", 280), ("other", 290)):
        dataset_of(tmp_path / name, compact_vocabulary(size))
    job = SETTINGS.replace("k = 5", f'k = 5\nlargest_norm_ratio = 1e9\nreference = "{tmp_path}/other"')
    job = job.replace('"1"]', '"1"]\n"<|call|>" = ["<|im_end|>"]')
    with pytest.raises(UpcycleError, match="the donor's tokenizer is not o200k_harmony_compact"):
        climb(write_ladder(tmp_path, repository, settings=job))
    report = climb(write_ladder(tmp_path, repository, settings=job.replace("/other", "/own")))
    figures = report["conversion"]["embedding.word_embeddings.weight"]
    assert figures["rows_copied"] >= 256 and figures["rows_padding"] == PADDED - 280
    after = AutoTokenizer.from_pretrained(tmp_path / "new" / "hf", trust_remote_code=True)
    text = "the ship was bound for 12345"
    assert after(text)["input_ids"] == compact_vocabulary(280).encode_ordinary(text).tolist()
    # It is known by the name that datasets have for it.
    assert read_vocabulary(tmp_path / "new" / "hf" / "vocabulary.json").identity() == compact_vocabulary(280).identity


@pytest.mark.slow
def test_what_cannot_be(tmp_path: Path, repository: Path) -> None:
    write_model(tmp_path / "model_hf")
    write_donor(tmp_path / "donor_hf")
    for settings, message in (
        (SETTINGS.replace('eos_tokens = ["<|return|>"]', 'eos_tokens = ["<|stop|>"]'), r"vocabulary: \['<\|stop\|>'\]"),
        (SETTINGS.replace("k = 5", "k = 5\nlargest_norm_ratio = 1.001"), "has norm"),
        (
            SETTINGS.replace("k = 5", 'k = 5\nreference = "o200k_harmony"\nlargest_norm_ratio = 1e9'),
            "the donor's tokenizer is not o200k_harmony",
        ),
    ):
        with pytest.raises(UpcycleError, match=message):
            climb(write_ladder(tmp_path, repository, settings=settings))
    with pytest.raises(UpcycleError, match="the declared geometry 264 rows"):
        climb(write_ladder(tmp_path, repository, padded=264))
    assert not (tmp_path / "new").exists()


def test_a_nan_ends_at_rung_1(tmp_path: Path, repository: Path) -> None:
    folder = write_model(tmp_path / "model_hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight: 1 of 32 values are not finite"):
        runner.run(runner.plan(write_ladder(tmp_path, repository), "old"), quiet=True)
    assert not (tmp_path / "old").exists()
