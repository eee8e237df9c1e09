"""The W&B sink: it gets the records, and nothing it does can hold or break a run."""

from __future__ import annotations

import json
import struct
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_vpmoe.metrics import JsonlSink, Record, WandbSink, open_sinks
from megatron_vpmoe.metrics import wandb as sink_module
from tests.tiny import tiny_config


class FakeWandb(ModuleType):
    """Stands in for the package; remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: dict = {}
        self.logged: list[tuple[int, dict]] = []
        self.finished = False
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
        self.finished = exit_code == 0


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
        sinks = open_sinks(cfg, tmp_path, resume_step=resume_step)
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


def history(path: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, values) in the order of an offline run's file: one protobuf a record, as LevelDB's logs have them."""
    from wandb.proto import wandb_internal_pb2

    content, at, found = path.read_bytes(), 7, []
    while at + 7 <= len(content):
        (length,) = struct.unpack_from("<H", content, at + 4)
        whole = content[at + 7 : at + 7 + length]
        at += 7 + length
        if len(whole) == length:
            items = wandb_internal_pb2.Record.FromString(whole).history  # pyright: ignore[reportAttributeAccessIssue]
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items.item}
            if values := {key: value for key, value in values.items() if not key.startswith("_")}:
                found.append((items.step.num, values))
    assert at < 32768  # no record goes over the end of a block
    return found
