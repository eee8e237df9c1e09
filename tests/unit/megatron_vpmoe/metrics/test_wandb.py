"""The W&B sink: it gets the records, and nothing it does can hold or break a run."""

from __future__ import annotations

import errno
import json
import struct
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_vpmoe.metrics import METRICS, JsonlSink, Record, WandbSink, open_sinks, records_until
from megatron_vpmoe.metrics import wandb as sink_module
from tests.tiny import tiny_config


class FakeWandb(ModuleType):
    """Stands in for the package; remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: dict = {}
        self.logged: list[tuple[int, dict]] = []
        self.finished, self.exit_code = False, -1
        self.gate = threading.Event()
        self.gate.set()

    def Settings(self, **settings):
        return settings

    def init(self, **arguments):
        self.gate.wait()
        self.started = arguments
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))

    def _finish(self, exit_code: int) -> None:
        self.finished, self.exit_code = exit_code == 0, exit_code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def start(tmp_path: Path, reports: list[str]) -> WandbSink:
    return WandbSink(
        project="p", run_name="r", mode="offline", directory=tmp_path, config={"lr": 1.0}, report=reports.append
    )


def test_records_arrive_by_step(fake: FakeWandb, tmp_path: Path):
    reports: list[str] = []
    sink = start(tmp_path, reports)
    sink.write([Record(1, "a", 1.0), Record(1, "b", 2.0)])
    sink.write([Record(2, "a", 3.0)])
    sink.close()
    assert fake.logged == [(1, {"a": 1.0, "b": 2.0}), (2, {"a": 3.0})]
    assert fake.finished and fake.started["mode"] == "offline" and fake.started["config"] == {"lr": 1.0}
    assert reports == []


def test_a_failing_start_is_reported_once_and_the_run_goes_on(fake: FakeWandb, tmp_path: Path, monkeypatch):
    def refuse(**arguments):
        raise RuntimeError("no service\nlong story")

    monkeypatch.setattr(fake, "init", refuse)
    reports: list[str] = []
    sink = start(tmp_path, reports)
    for step in range(3000):
        sink.write([Record(step, "a", 1.0)])
    sink.close()
    assert len(reports) == 1 and "RuntimeError: no service" in reports[0] and "long story" not in reports[0]


def test_a_failing_log_is_reported_once_and_the_run_goes_on(fake: FakeWandb, tmp_path: Path, monkeypatch):
    def refuse(values, step):
        raise ConnectionError("gone")

    monkeypatch.setattr(fake, "_log", refuse)
    reports: list[str] = []
    sink = start(tmp_path, reports)
    sink.write([Record(1, "a", 1.0)])
    sink.write([Record(2, "a", 1.0)])
    sink.close()
    assert len(reports) == 1 and "ConnectionError: gone" in reports[0]


def test_a_package_that_is_not_there_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    reports: list[str] = []
    sink = start(tmp_path, reports)
    sink.write([Record(1, "a", 1.0)])
    sink.close()
    assert len(reports) == 1 and "wandb" in reports[0]


@pytest.mark.parametrize("when", ["_log", "_finish"])
def test_a_full_disk_stops_nothing(fake: FakeWandb, tmp_path: Path, monkeypatch, when: str):
    def full(*_: object, **__: object):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fake, when, full)
    reports: list[str] = []
    sink = start(tmp_path, reports)
    for step in range(3):
        sink.write([Record(step, "a", 1.0)])
    sink.close()
    assert len(reports) == 1 and "No space left" in reports[0]


def test_a_run_that_fails_fails_there_too(fake: FakeWandb, tmp_path: Path):
    sink = start(tmp_path, [])
    sink.close("NonFiniteError: the loss is not finite")
    assert fake.exit_code == 1


def test_a_hanging_service_holds_nothing_up(fake: FakeWandb, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sink_module, "_PATIENCE_SECONDS", 0.2)
    fake.gate.clear()
    reports: list[str] = []
    sink = start(tmp_path, reports)
    started = time.monotonic()
    for step in range(3000):
        sink.write([Record(step, "a", 1.0)])
    sink.close()
    assert time.monotonic() - started < 5
    assert len(reports) == 1
    fake.gate.set()


def test_disabled_means_absent(tmp_path: Path):
    sinks = open_sinks(tiny_config(wandb_mode="disabled"), tmp_path)
    assert [type(sink) for sink in sinks] == [JsonlSink]
    sinks[0].close()


def test_offline_needs_no_account_and_leaves_a_run_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    reports: list[str] = []
    sink = start(tmp_path, reports)
    sink.write([Record(1, "a", 1.0)])
    sink.close()
    assert reports == []
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_resumed_offline_run_is_one_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first life ended abruptly after step 7 and goes on from step 5: what is left to sync has each step once."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    cfg = tiny_config(wandb_mode="offline")
    for resume_step, steps in ((0, range(1, 8)), (5, range(6, 11))):
        sinks = open_sinks(cfg, tmp_path, records_until(tmp_path / METRICS, resume_step))
        for step in steps:
            for sink in sinks:
                sink.write([Record(step, "loss", float(step)), Record(step, "life", float(resume_step))])
        for sink in sinks:
            sink.close()
    (left,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert len(list(tmp_path.glob("wandb/superseded-run-*/*.wandb"))) == 1  # nothing is removed
    expected = [(step, {"loss": step, "life": 0 if step < 6 else 5}) for step in range(1, 11)]
    deadline = time.monotonic() + 20
    while (found := history(left)) != expected and time.monotonic() < deadline:
        time.sleep(0.05)  # W&B's own process is still writing
    assert found == expected
    configured = {item.key: json.loads(item.value_json) for each in messages(left) for item in each.run.config.update}
    assert configured["model"] == cfg.model_dump(mode="json")["model"]
    assert [each.run.run_id for each in messages(left) if each.run.run_id] == [cfg.training.run_name]


def history(path: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, values) in the order of an offline run's file."""
    found = []
    for message in messages(path):
        items = message.history
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items.item}
        if values := {key: value for key, value in values.items() if not key.startswith("_")}:
            found.append((items.step.num, values))
    return found


def messages(path: Path) -> list[Any]:
    """What an offline run's file holds: W&B's own messages, in blocks of 32 KiB as LevelDB's logs have them."""
    from wandb.proto import wandb_internal_pb2

    content, at, found, whole = path.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the end of a block has no room for a header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole = content[at + 7 : at + 7 + length] if kind in (1, 2) else whole + content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(content):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(whole))  # pyright: ignore[reportAttributeAccessIssue]
    return found
