"""metrics.jsonl: what is logged is read back, now and after a kill."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vpmoe.errors import DataError, of_the_system
from megatron_vpmoe.metrics import JsonlSink, MetricStream, Record, read_records, records_until
from megatron_vpmoe.training import checkpoint
from megatron_vpmoe.training.loop import train
from tests.fixtures_dataset import small_dataset
from tests.tiny import tiny_config


def log(path: Path, steps: range, *, resume_step: int = 0) -> None:
    stream = MetricStream([JsonlSink(path, records_until(path, resume_step))])
    for step in steps:
        stream.log(step, {"loss/total": 1.0 / step, "lr": torch.tensor(step)})
    stream.close()


def test_each_record_is_a_line_of_json(tmp_path: Path):
    log(tmp_path / "run" / "metrics.jsonl", range(1, 3))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "tag": "loss/total", "value": 1.0},
        {"step": 1, "tag": "lr", "value": 1.0},
        {"step": 2, "tag": "loss/total", "value": 0.5},
        {"step": 2, "tag": "lr", "value": 2.0},
    ]


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "full.jsonl"
    path.symlink_to("/dev/full")
    sink = JsonlSink.__new__(JsonlSink)
    sink._path, sink._stream = path, path.open("a")
    for act in (lambda: sink.write([Record(1, "loss/total", 2.5)]), sink.close):
        with pytest.raises(OSError, match="No space left") as caught:
            act()
        assert str(path) in str(of_the_system(caught.value))


def test_a_step_is_on_disk_before_the_next_begins(tmp_path: Path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write([Record(1, "a", 2.0)])
    assert read_records(tmp_path / "m.jsonl") == [Record(1, "a", 2.0)]
    sink.close()


def test_resuming_drops_the_steps_that_will_be_done_again(tmp_path: Path):
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    log(straight, range(1, 11))
    log(resumed, range(1, 8))
    log(resumed, range(6, 11), resume_step=5)
    assert resumed.read_text() == straight.read_text()


def test_a_run_from_the_start_begins_an_empty_file(tmp_path: Path):
    log(tmp_path / "m.jsonl", range(1, 4))
    log(tmp_path / "m.jsonl", range(1, 2))
    assert {record.step for record in read_records(tmp_path / "m.jsonl")} == {1}


def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    log(path, range(1, 3))
    whole = path.read_text()
    path.write_text(whole[:-9])
    assert len(read_records(path)) == 3
    log(path, range(2, 3), resume_step=1)
    assert path.read_text() == whole


@pytest.mark.parametrize("more", ["", f', "tag": "a", "value": 1{"0" * 400}', ', "tag": "a", "value": 1, "step": 1e99'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, more: str):
    path = tmp_path / "m.jsonl"
    log(path, range(1, 3))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], f'{{"step": 1{more}}}\n', *lines[1:]]))
    with pytest.raises(DataError, match=r"m\.jsonl:2"):
        records_until(path, 5)


def test_values_that_are_no_numbers_survive(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    stream = MetricStream([JsonlSink(path)])
    stream.log(1, {"nan": math.nan, "up": math.inf, "down": -math.inf})
    stream.close()
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    values = {record.tag: record.value for record in read_records(path)}
    assert math.isnan(values["nan"]) and (values["up"], values["down"]) == (math.inf, -math.inf)


def test_a_stream_without_sinks_takes_everything():
    stream = MetricStream([])
    stream.log(1, {"a": 1.0})
    stream.close()


def test_records_are_on_disk_before_a_checkpoint_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single_process: None
):
    cfg = tiny_config(
        data_path=small_dataset(tmp_path / "data"),
        run_dir=tmp_path / "run",
        train_iters=2,
        save_interval=1,
        lr_warmup_iters=1,
        log_interval=1,
    )
    events: list[str] = []
    on_disk, sealed = os.fsync, checkpoint.seal

    def fsync(descriptor: int) -> None:
        on_disk(descriptor)
        if Path(f"/proc/self/fd/{descriptor}").readlink() == tmp_path / "run" / "metrics.jsonl":
            events.append(f"records of step {read_records(tmp_path / 'run' / 'metrics.jsonl')[-1].step}")

    def seal(partial: Path, final: Path, *rest: Any) -> None:
        events.append(final.name)
        sealed(partial, final, *rest)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(checkpoint, "seal", seal)
    train(cfg)
    assert events == ["records of step 1", "iter_0000001", "records of step 2", "iter_0000002"]
