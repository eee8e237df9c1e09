"""Two small byte-level vocabularies with some tokens in common, and models that have them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.tiny_qwen3 import write_qwen3

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


def write_model(folder: Path, **changes: object) -> Path:
    """A tiny Qwen3 with the source vocabulary, its embedding padded beyond it."""
    write_qwen3(folder, vocab_size=SOURCE_ROWS, num_hidden_layers=1, hidden_size=32, initializer_range=0.05, **changes)
    assert write_tokenizer(folder, SOURCE_TEXT, SOURCE_SPECIALS, 330) < SOURCE_ROWS
    return folder


def write_donor(folder: Path, *, model_type: str = "gpt_oss", tied: bool = False) -> Path:
    """Tokenizer and embedding of a donor, and no other weights."""
    assert write_tokenizer(folder, DONOR_TEXT, DONOR_SPECIALS, 335) < DONOR_ROWS
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
