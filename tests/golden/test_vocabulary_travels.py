"""A dataset's vocabulary goes with the weights: through a run from random weights and one after it, into the export."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vpmoe.manifest import read_manifest
from tests.training_runs import train
from tests.unit.vpmoe.test_provenance_blocks import whole
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.datasets.sequential import Pass, build_sequential
from vpmoe.data_curation.datasets.text import HealingText
from vpmoe.data_curation.rows.source import resolve
from vpmoe.hf.convert import export_checkpoint, import_directory, open_directory
from vpmoe.steps import RECEIPT, read_receipt
from vpmoe.tokenizer import CompactVocabulary, load_tokenizer
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE, load_o200k_harmony

pytestmark = pytest.mark.slow
WORDS = ["the", "ship", "left", "harbour", "before", "dawn", "12", "345", "naïve", "漢字", "and", "so", "on"]
ROWS = 384


def dataset(folder: Path, kept: str) -> Path:
    """Plain text in a compact vocabulary that holds the tokens of ``kept``."""
    folder.mkdir()
    draw = random.Random(1)
    rows = [{"id": str(n), "text": " ".join(draw.choices(WORDS, k=draw.randint(8, 30)))} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = np.bincount(load_o200k_harmony().encode_ordinary(kept), minlength=VOCAB_SIZE)
    CompactVocabulary.from_counts(load_o200k_harmony(), counts).save(folder / "map.npy")
    base = BuildOptions(seq_len=48, valid_fraction=0.2, compact_map=folder / "map.npy", padded_vocab_size=ROWS)
    build_sequential(resolve(str(folder / "rows.jsonl")), folder / "built", HealingText(base=base), Pass(), quiet=True)
    return folder / "built"


def test_from_dataset_to_hf_directory(tmp_path: Path) -> None:
    data = dataset(tmp_path / "text", " ".join(WORDS))
    small = {"padded_vocab_size": ROWS, "num_layers": 2, "window_attn_skip_freq": 2, "objective": "token_ce"}
    first = train(tmp_path / "first", data, **small, train_iters=2, lr_warmup_iters=0)
    assert first.returncode == 0, first.stderr
    # A run that starts from those weights; a dataset of another vocabulary is refused.
    weights = {"load_weights": tmp_path / "first", "train_iters": 1, "lr_warmup_iters": 0}
    second = train(tmp_path / "second", data, **small, **weights)
    assert second.returncode == 0, second.stderr
    other = dataset(tmp_path / "other", "nothing of it")
    refused = train(tmp_path / "third", other, **small, **weights)
    assert refused.returncode == 2 and "do not share a vocabulary" in refused.stderr

    exported = export_checkpoint(tmp_path / "second", tmp_path / "hf").path
    ours = load_tokenizer(data)
    theirs = AutoTokenizer.from_pretrained(exported, trust_remote_code=True, local_files_only=True)
    text = "so the ship 12345 <|end|> unseen 🙂"
    ids = theirs(text, split_special_tokens=True)["input_ids"]
    assert ids == ours.encode_ordinary(text).tolist()
    model: Any = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    ends = [ours.special_id(token) for token in ("<|return|>", "<|call|>", "<|endoftext|>")]
    assert model.generation_config.eos_token_id == ends
    assert model.generation_config.pad_token_id == theirs.pad_token_id == ours.eod_id
    question = [{"role": "user", "content": "so?"}]
    batch = theirs.apply_chat_template([question, question], add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[0] == 2

    block = json.loads((exported / "config.json").read_text())["provenance"]
    assert whole(block) and block["dataset_manifest_sha256"] == read_manifest(data).sha256
    receipt = read_receipt(exported)["provenance"]
    assert whole(receipt) and [receipt[name] for name in ("config_hash", "tokenizer")] == [
        block[name] for name in ("config_hash", "tokenizer")
    ]

    # Back into a checkpoint and out again: the same directory, but for what its receipt says of where it came from.
    again = import_directory(open_directory(exported), tmp_path / "again")
    twice = export_checkpoint(again.path, tmp_path / "hf_twice").path
    files, as_many = ({path.name for path in folder.iterdir()} - {RECEIPT} for folder in (exported, twice))
    assert files == as_many
    assert [name for name in files if (exported / name).read_bytes() != (twice / name).read_bytes()] == []
