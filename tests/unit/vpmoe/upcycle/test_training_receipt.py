"""What a receipt reads off metrics: windows of router health, validation before and after, length and speed."""

from __future__ import annotations

import math

import pytest

from megatron_vpmoe.metrics import Record
from tests.tiny import tiny_config
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.training_receipt import router_report, training_report, validation_report


def test_router_health_of_the_first_and_last_fifty_steps() -> None:
    tag, layer = "moe/router_agg/max_vio", "moe/router/layer_2/max_vio"
    records = [Record(step, name, float(step)) for step in range(10, 201, 10) for name in (tag, layer, "loss/total")]
    report = router_report(records, 200)
    assert report["first_steps"]["steps"] == [10, 20, 30, 40, 50]
    assert report["first_steps"][tag] == {"first": 10.0, "last": 50.0, "mean": 30.0, "min": 10.0, "max": 50.0}
    assert report["last_steps"]["steps"] == [160, 170, 180, 190, 200]
    assert set(report["last_steps"]) == {"steps", tag}


def test_validation_needs_both_ends_and_finite_losses() -> None:
    loss = [Record(0, "valid/text/loss/total", 3.0), Record(50, "valid/text/loss/total", 2.5)]
    last = Record(100, "valid/text/loss/total", 2.0)
    assert validation_report([*loss, last], 100, source="x") == {"valid/text/loss/total": {"before": 3.0, "after": 2.0}}
    for records in ([], loss, [*loss, last._replace(value=math.nan)]):
        with pytest.raises(UpcycleError, match="no finite validation"):
            validation_report(records, 100, source="x")


def test_length_and_speed() -> None:
    cfg = tiny_config(train_iters=4)
    values = {"tokens/real": [100.0, 120.0], "throughput/tokens_per_second": [50.0, 60.0], "loss/total": [4.0, 3.0]}
    records = [Record(2 * (i + 1), tag, value) for tag, pair in values.items() for i, value in enumerate(pair)]
    report = training_report(records, cfg, skipped_steps=1, source="x")
    assert report == {
        "objective": "span_ce",
        "steps": 4,
        "rows": 16,
        "tokens": 440,
        "logged_steps": 2,
        "tokens_per_second": 55.0,
        "training_seconds": 8.0,
        "loss_first": 4.0,
        "loss_last": 3.0,
        "skipped_steps": 1,
    }
    with pytest.raises(UpcycleError, match="no step of it is on record"):  # the file was lost after the last step
        training_report(records[:2], cfg, skipped_steps=0, source="metrics.jsonl")
