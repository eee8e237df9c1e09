"""A conversation in the app with a model of another design, in a vocabulary of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vpmoe.model.builder import build_model
from tests.learned_vocabulary import write_vocabulary
from tests.tiny import NANO_MOE, tiny_config
from vpmoe.app.models import Held
from vpmoe.app.talk import Slot, ask, measure, times_as_fast, turn_html
from vpmoe.tokenizer.hf_directory import HFDirectory

SETTINGS = {
    "draw": {"temperature": 0.0, "max_new_tokens": 6},
    **{"plain": False, "reasoning": None, "only_valid": False, "cached": True},
}


@pytest.fixture(params=["harmony", "qwen"])
def model(request: pytest.FixtureRequest, single_process: None, tmp_path: Path) -> Held:
    """One that knows conversations, and one that does not."""
    torch.manual_seed(3)
    model = build_model(tiny_config(**NANO_MOE, padded_vocab_size=320)).eval()
    tokenizer = HFDirectory(write_vocabulary(tmp_path / "vocabulary", special_tokens=request.param), 320)
    opened: Any = SimpleNamespace(model=model, tokenizer=tokenizer, context=64, prompts=(), path=tmp_path)
    return Held(opened)


def test_a_text_is_gone_on_with_in_any_vocabulary(model: Held) -> None:
    slot, settings = Slot(), {**SETTINGS, "passage": True}
    outcome = ask(slot, model, "Once upon", settings, lambda turn: None)
    tokenizer, (turn,) = model.opened.tokenizer, slot.turns
    assert outcome.prompt_tokens == len(tokenizer.encode_ordinary("Once upon\n\n")) and outcome.completion is not None
    written = [one for one in outcome.completion.ids if not tokenizer.is_special(one)]
    assert "".join(words for _, words in turn.messages) == tokenizer.decode(written)
    assert not slot.said  # each is given alone
    assert measure(model, "Once upon", settings, 4)[0]["tokens"] <= 4


def test_it_is_asked_and_measured(model: Held) -> None:
    slot, drawn = Slot(), []
    ask(slot, model, "Tell of Mia.", SETTINGS, lambda turn: drawn.append(turn_html(turn)))
    (turn,) = slot.turns
    assert drawn and turn.note and turn.figures.startswith("6 tokens, ") and turn.figures.endswith("KV cache on")
    rows = measure(model, "Tell of Mia.", SETTINGS, 1000)
    assert [row["KV cache"] for row in rows] == ["on", "off"] and rows[0]["ids"] == rows[1]["ids"]
    assert 1 <= rows[0]["tokens"] == rows[1]["tokens"] < 64  # the context ends it
    assert times_as_fast(rows).endswith("times as fast")
    assert times_as_fast(measure(model, "Tell of Mia.", SETTINGS, 1)) == "too few tokens to tell"
