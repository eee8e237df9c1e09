"""The report of ``vpmoe think-nano``: what it reads of metrics, what it says of gains and losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vpmoe.quickstart.think_report import measured, middle, routing_table, said, table

DOMAINS = ("sums", "words")
KINDS = ("transformer", "state_space", "denoiser")
LOADED = {"transformer": 1.0, "state_space": 1.4}


def _run(folder: Path, name: str, last: dict[str, float], first: float = 9.0) -> Any:
    """A run with metrics of two validations, of which the last counts."""
    records = [{"step": step, "tag": tag, "value": value} for step in (1, 2) for tag, value in last.items()]
    for record in records[: len(last)]:
        record["value"] = first
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return SimpleNamespace(metrics=path)


def _losses(tokens: float, sums: float, words: float) -> dict[str, float]:
    return {"elapsed/tokens": tokens, "valid/sums/loss/total": sums, "valid/words/loss/total": words}


def _seed(folder: Path, full: float = 0.6, sums_weight: float = 0.7, denoiser: float = 0.1) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    weights = {"sums": (sums_weight, 1 - sums_weight - denoiser, denoiser), "words": (0.5, 0.5 - denoiser, denoiser)}
    routing = {
        f"valid/{domain}/routing/{name}": value
        for domain, of in weights.items()
        for name, value in zip((*KINDS, "entropy"), (*of, 0.8), strict=True)
    }
    routing |= {f"valid/{domain}/routing/{name}/std": 0.05 for domain in DOMAINS for name in KINDS}
    errors = {f"valid/{domain}/denoised/error": 1.2 for domain in DOMAINS}
    parts = {
        "transformer": _losses(100, 0.9, 1.1),
        "state_space": _losses(100, 1.2, 1.6),
        "diffuser": {**_losses(100, 0.8, 1.0), **errors},
        "full": {**_losses(50, full - 0.1, full + 0.1), **routing},
        "storeless": _losses(50, 0.6, 0.7),
        "transformer_alone": _losses(50, 0.4, 1.0),
        "state_space_alone": _losses(50, 0.6, 0.8),
    }
    runs: Any = SimpleNamespace(seed=1, parts={name: _run(folder, name, last) for name, last in parts.items()})
    return measured(runs, DOMAINS)


def test_every_domain_counts_the_same_and_tokens_are_equal(tmp_path: Path) -> None:
    one = _seed(tmp_path)
    assert one["full"]["nats"] == pytest.approx(0.6) and one["full"]["domains"]["words"]["nats"] == pytest.approx(0.7)
    assert one["full"]["perplexity"] == pytest.approx(math.exp(0.6))
    assert one["store"] == pytest.approx({"with": 0.6, "without": 0.65})
    for name, nats in {"transformer": 0.7, "state_space": 0.7}.items():
        alone = one["experts"][name]
        assert alone["nats"] == pytest.approx(nats) and alone["as_loaded"]["nats"] == pytest.approx(LOADED[name])
        assert alone["tokens"] == one["full"]["tokens"] == 150 and alone["as_loaded"]["tokens"] == 100
    assert one["experts"]["diffuser"]["error"] == pytest.approx(0.9)
    assert one["experts"]["diffuser"]["denoised_error"] == pytest.approx(1.2)
    routing = dict(one["routing"]["sums"])
    assert routing.pop("std") == pytest.approx(dict.fromkeys(KINDS, 0.05))
    assert routing == pytest.approx({"transformer": 0.7, "state_space": 0.2, "denoiser": 0.1, "entropy": 0.8})
    assert "| 1 | full model | 150 | 0.6000 | 1.822 | 0.5000 | 0.7000 |" in table([one], DOMAINS)
    row = "| 1 | sums | 70.0 % ± 5.0 % | 20.0 % ± 5.0 % | 10.0 % ± 5.0 % | 0.800 | 0.800 | 1.200 |"
    assert row in routing_table([one])


def test_medians_keep_the_shape(tmp_path: Path) -> None:
    seeds = [_seed(tmp_path, full) for full in (0.6, 0.9, 0.7)]
    found = middle(seeds)
    assert found.keys() == seeds[0].keys() - {"seed"} and found["full"]["nats"] == pytest.approx(0.7)
    assert found["experts"]["diffuser"]["domains"]["sums"]["error"] == pytest.approx(0.8)


def test_what_helps_and_what_does_not_is_said(tmp_path: Path) -> None:
    lines = said([_seed(tmp_path)])
    assert "the full model against the transformer alone at equal tokens: helps (+0.1000 nats a token saved)" in lines
    assert "the store against the same model trained without it: helps (+0.0500 nats a token saved)" in lines
    assert any(line.startswith("routing by domain: the router tells domains apart") for line in lines)
    assert not any("denoiser does not help" in line for line in lines)
    lines = said([_seed(tmp_path, full=1.1, sums_weight=0.52, denoiser=0.01)])
    assert any("transformer alone at equal tokens: does not help (-0.4000" in line for line in lines)
    assert any("best of its experts as they were loaded: does not help (-0.1000" in line for line in lines)
    assert any("hardly tells domains apart; most differs the weight of the transformer, by 2.0 %" in x for x in lines)
    assert "the denoiser does not help: it has at most 1.0 % of the weight anywhere" in lines
    lines = said([_seed(tmp_path), _seed(tmp_path, full=0.8)])
    assert any("state space alone at equal tokens: helps with some seeds only" in line for line in lines)
