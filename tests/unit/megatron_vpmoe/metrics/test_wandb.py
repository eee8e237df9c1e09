"""The W&B sink: it gets the records, and nothing it does can hold or break a run."""

from __future__ import annotations

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

    def _finish(self) -> None:
        self.finished = True


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
