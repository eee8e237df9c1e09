"""Two small byte-level vocabularies with some tokens in common, and models that have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_vpmoe.files import write_record
from tests.tiny_qwen3 import write_qwen3
from vpmoe.hf import tokenizer_files
from vpmoe.hf.tokenization_vpmoe import COMPACT_MAP
from vpmoe.tokenizer import CompactVocabulary
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE, load_o200k_harmony

SOURCE_TEXT = "the ship left the harbour before dawn; the harbour was still. 1 2 3 4 5 and 1234567890. " * 4
DONOR_TEXT = "the ship was bound for another harbour, then dawn came. numbers: 12 34 123 345 2025. " * 4
SOURCE_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DONOR_SPECIALS = ["<|start|>", "<|end|>", "<|message|>", "<|return|>"]
SOURCE_ROWS, DONOR_ROWS, DONOR_HIDDEN = 340, 344, 24


def write_tokenizer(folder: Path, text: str, specials: list[str], size: int) -> int:
    """Train and save a byte-level BPE; returns the number of its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return tokenizer.get_vocab_size()


def write_model(folder: Path, **changes: Any) -> Path:
    """A tiny Qwen3 with the source vocabulary, its embedding padded beyond it."""
    write_qwen3(folder, vocab_size=SOURCE_ROWS, num_hidden_layers=1, hidden_size=32, initializer_range=0.05, **changes)
    assert write_tokenizer(folder, SOURCE_TEXT, SOURCE_SPECIALS, 330) < SOURCE_ROWS
    return folder


def compact_vocabulary(size: int) -> CompactVocabulary:
    """Of the words of the two texts, ``size`` ids in all."""
    full = load_o200k_harmony()
    counts = np.bincount(full.encode_ordinary(SOURCE_TEXT + DONOR_TEXT), minlength=VOCAB_SIZE)
    return CompactVocabulary.from_counts(full, counts, max_size=size)


def dataset_of(folder: Path, vocabulary: CompactVocabulary) -> dict[str, Any]:
    """A dataset's manifest without rows, and its map beside it; returns what it says of the vocabulary."""
    vocabulary.save(folder / COMPACT_MAP)
    told = {"tokenizer": {**vocabulary.entry, "pieces": {"path": "token_pieces.txt", "sha256": ""}}, "splits": {}}
    write_record(folder / "manifest.json", {"schema_version": 1, "kind": "harmony_kd", "seq_length": 8, **told})
    return vocabulary.entry


def write_donor(
    folder: Path, *, model_type: str = "gpt_oss", tied: bool = False, vocabulary: CompactVocabulary | None = None
) -> Path:
    """Tokenizer and embedding of a donor, and no other weights; with a compact vocabulary as an export has it."""
    if vocabulary is None:
        assert write_tokenizer(folder, DONOR_TEXT, DONOR_SPECIALS, 335) < DONOR_ROWS
    else:
        (folder / "vocabulary.json").write_text(json.dumps(dataset_of(folder, vocabulary)))
        files, _ = tokenizer_files.made_from(folder.iterdir())
        for name, content in files.items():
            (folder / name).write_bytes(content)
    generator = torch.Generator().manual_seed(5)
    tensors = {"model.embed_tokens.weight": torch.randn(DONOR_ROWS, DONOR_HIDDEN, generator=generator)}
    if not tied:
        tensors["lm_head.weight"] = torch.randn(DONOR_ROWS, DONOR_HIDDEN, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    architectures = {"gpt_oss": "GptOssForCausalLM", "llama": "LlamaForCausalLM"}
    config = {
        "model_type": model_type,
        "architectures": [architectures[model_type]],
        "hidden_size": DONOR_HIDDEN,
        "vocab_size": DONOR_ROWS,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": tied,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
