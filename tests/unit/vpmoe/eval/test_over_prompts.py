"""What is measured over prompts is what the engine did with them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.prompts import Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.moe.experts import StackedExperts
from tests.learned_vocabulary import write_vocabulary
from tests.tiny import NANO_MOE, tiny_config
from vpmoe.errors import DataError
from vpmoe.eval import over_prompts
from vpmoe.eval.asking import stop_ids
from vpmoe.eval.inspection import pieces_of
from vpmoe.eval.over_prompts import OverPrompts, measured, prompts_of
from vpmoe.eval.plots import plot_first_choice, plot_throughput, plot_usage
from vpmoe.tokenizer.hf_directory import HFDirectory

PROMPTS = ["One day", "The cat sat.", "Äpfel"]


@pytest.fixture(params=["vpmoe", "nano_moe"])
def opened(request: pytest.FixtureRequest, single_process: None, tokenizer: Any, tmp_path: Path) -> Any:
    """vpMoE with a part of o200k, and another design with a vocabulary of its own."""
    torch.manual_seed(3)
    model = build_model(tiny_config(**(NANO_MOE if request.param == "nano_moe" else {}), padded_vocab_size=320))
    if request.param == "nano_moe":
        tokenizer = HFDirectory(write_vocabulary(tmp_path / "vocabulary"), 320)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3)
    return SimpleNamespace(model=model, tokenizer=tokenizer, context=40, prompts=(), path=Path("x"))


def test_usage_is_that_of_the_tokens_written(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    found = measured(opened, PROMPTS, 12, plain=True, passage=False, say=said.append)
    layers = sum(isinstance(module, StackedExperts) for module in opened.model.modules())
    assert found.form == "text" and said and found.layers == [*range(5 - layers, 5)] and found.topk == 2
    ids = [opened.tokenizer.encode_ordinary(text).tolist() for text in PROMPTS]
    assert "".join(pieces_of(opened.tokenizer, ids[1])) == PROMPTS[1]
    options = SamplingOptions(stop_ids=stop_ids(opened.tokenizer), temperature=0.0, max_new_tokens=12)
    done = generate(opened.model, [Prompt(one) for one in ids], options, record_routing=True)
    assert found.tokens.tolist() == [len(one.ids) for one in done]
    for place, (prompt, one) in enumerate(zip(ids, done, strict=True)):
        routed = np.concatenate(one.routing).reshape(-1, layers, 2)[len(prompt) :]
        # The engine does not compute the last token.
        counts = np.stack([np.bincount(routed[:, layer].flatten(), minlength=8) for layer in range(layers)])
        missing = found.usage[place] * 2 * len(one.ids) - counts
        assert (missing > -1e-9).all() and missing.sum(1) == pytest.approx([2] * layers)
    assert ((found.first_choice >= 0.5) & (found.first_choice <= 1)).all()
    assert all((rate > 0).all() for rate in found.rate.values())
    monkeypatch.setattr(over_prompts, "stop_ids", lambda _: (done[0].ids[0],))
    early = measured(opened, PROMPTS, 12, plain=True, passage=False, say=said.append)
    assert early.tokens[0] == 1 and all((rate > 0).all() for rate in early.rate.values())  # as many tokens are timed
    entry = json.loads(json.dumps(found.entry()))
    assert entry["layers"]["3"]["usage"]["mean"] == pytest.approx(found.usage[:, layers - 2].mean(0).tolist())
    assert entry["tokens_per_second"]["on"]["std"] == pytest.approx(found.rate["on"].std())


def test_prompts_are_asked_as_the_vocabulary_can_and_a_long_one_is_refused(opened: Any) -> None:
    found = measured(opened, ["x"], 2, plain=False, passage=False, say=lambda _: None)
    assert found.form == "conversation" and found.tokens.tolist() == [2]
    found = measured(opened, ["x"], 2, plain=False, passage=True, say=lambda _: None)
    assert found.form == "passage" and found.tokens.tolist() == [2]
    with pytest.raises(DataError, match="a prompt of 50 tokens"):
        measured(opened, ["x" * 50], 2, plain=True, passage=False, say=lambda _: None)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One\u2028day\r\n\n Two \n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "One\\nday", "theme": 1}\n\n{"prompt": "Two"}')
    assert prompts_of(tmp_path / "a.txt") == ["One\u2028day", " Two "]
    assert prompts_of(tmp_path / "a.jsonl") == ["One\nday", "Two"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "One"}\n{"text": "Two"}\n')
    (tmp_path / "b.txt").write_text("\n \n")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    for name, told in (("b.jsonl", "b.jsonl:2"), ("b.txt", "no prompt"), ("c.txt", "read"), ("none.txt", "read")):
        with pytest.raises(DataError, match=told):
            prompts_of(tmp_path / name)


def drawn(layers: int, experts: int, seed: int) -> OverPrompts:
    random = np.random.default_rng(seed)
    usage = random.dirichlet(np.ones(experts), (5, layers))
    rate = {"on": random.uniform(50, 60, 5), "off": random.uniform(8, 10, 5)}
    first = random.uniform(0.5, 1, (5, layers))
    return OverPrompts("text", np.full(5, 7), rate, [*range(2, 2 + layers)], usage, first, 2)


@pytest.mark.slow
def test_pictures_of_models_of_any_size(tmp_path: Path) -> None:
    models = {"_a $\\frac{$": drawn(6, 4, 1), "b": drawn(79, 256, 2), "c": drawn(1, 1, 3)}
    for number, draw in enumerate((plot_throughput, plot_usage, plot_first_choice)):
        draw(models, tmp_path / f"{number}.png")
        assert min(Image.open(tmp_path / f"{number}.png").size) > 300
