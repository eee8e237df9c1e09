"""A vocabulary of bytes and special tokens, generations written by hand in it, and a run on a real dataset."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.mini_dataset import write_mini
from tests.tiny import tiny_config
from vpmoe.eval.asking import AsConversation
from vpmoe.tokenizer import CompactVocabulary, O200kHarmony, Tokenizer
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE

GOOD = "<|channel|>analysis<|message|>7 + 8 = 15<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"


@pytest.fixture(scope="session")
def tokenizer() -> CompactVocabulary:
    return CompactVocabulary.from_counts(O200kHarmony(), np.zeros(VOCAB_SIZE, dtype=np.int64), padded_vocab_size=320)


@pytest.fixture(scope="session")
def form(tokenizer: CompactVocabulary) -> AsConversation:
    return AsConversation(tokenizer)


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text in which special tokens are spelled out."""
    found: list[int] = []
    for part in re.split(r"(<\|\w+\|>)", text):
        special = part in tokenizer.special_tokens
        found += [tokenizer.special_tokens[part]] if special else tokenizer.encode_ordinary(part).tolist()
    return found


@pytest.fixture(scope="session")
def ids(tokenizer: CompactVocabulary) -> Callable[[str], list[int]]:
    return lambda text: ids_of(text, tokenizer)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rows/, conversations/ and dataset/, by the commands."""
    return write_mini(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run that has trained for no step, with one checkpoint."""
    from megatron_vpmoe.runtime.distributed import single_process
    from megatron_vpmoe.training.run import open_run

    folder = tmp_path_factory.mktemp("runs") / "untrained"
    fields = {"padded_vocab_size": 448, "seq_length": 192, "data_path": data / "dataset", "run_dir": folder}
    cfg = tiny_config(**fields)
    with single_process(seed=cfg.training.seed):
        run = open_run(cfg)
        # Other weights than those that the seed gives: a loader that loads nothing would be found out.
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(1.01)
        torch.save({name: value.clone() for name, value in run.model.named_parameters()}, folder / "weights.pt")
        run.save()
        run.settle()
        run.source.close()
    (folder / "metrics.jsonl").write_text('{"step": 1, "tag": "loss/final", "value": 2.0}\n')
    return folder
