"""``scripts/train.sh`` as a user meets it: help, dry run, and errors that end in exit code 2 without a traceback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vpmoe.config import load_config
from megatron_vpmoe.config.schema import fields
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.launch.__main__ import main
from megatron_vpmoe.launch.reference import help_text
from megatron_vpmoe.launch.workers import Nodes, run_workers, share_cores


def test_help_explains_every_field() -> None:
    text = " ".join(help_text().split())
    for spec in fields().values():
        assert f"{spec.flag} (" in text
        assert " ".join((spec.info.description or "?").split()) in text


def test_dry_run_prints_what_would_run(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = ["--objective", "topk_kd", "--teacher-server", "http://a:1", "--served-model", "gpt-oss"]
    assert main([str(run_yaml), "--dry-run", "--lr", "0.5", *served]) == 0
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN  # or a lost connection would end whoever called
    out = capsys.readouterr().out
    teacher = "the teacher is gpt-oss at http://a:1: no memory here"
    for expected in ("lr: 0.5", "routed experts", "active per token", "needed of each device", teacher):
        assert expected in out
    assert main([str(run_yaml), "--dry-run", "--objective", "topk_kd", "--teacher-weights", "runs/none"]) == 0
    assert "the teacher is not counted: no complete checkpoint (runs/none)" in capsys.readouterr().out
    assert main([str(run_yaml), "--dry-run", "--global-batch-size", "4194304", "--seq-length", "4194304"]) == 2
    assert "does not fit: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no configuration given"),
        (["nowhere.yaml"], "cannot read nowhere.yaml"),
        (["RUN", "--lrr", "1"], "unknown flag --lrr; nearest: --lr"),
        (["RUN", "--data-path", "nowhere"], "nowhere"),
        (["RUN", "--global-batch-size", "5"], "5 rows are not a multiple of 1 x 2 data-parallel ranks"),
    ],
)
def test_user_errors_end_with_two(
    run_yaml: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_yaml) if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "remedy:" in error
    assert "Traceback" not in error
    assert main([*(str(run_yaml) if word == "RUN" else word for word in words), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_asked_to_save_before_there_is_anything_it_goes_on(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise ConfigError("the check went on")

    monkeypatch.setattr("megatron_vpmoe.launch.preflight.check_machine", asked)
    before = signal.getsignal(signal.SIGUSR1)
    assert main([str(run_yaml)]) == 2
    assert capsys.readouterr().err == "SIGUSR1: there is nothing to save yet\nerror: the check went on\n"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_train_sh_hands_on_arguments_and_exit_code(repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = repository / "scripts" / "train.sh"
    result = subprocess.run(
        [script, "no such.yaml", "--lr", "1"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert result.returncode == 2
    assert "cannot read no such.yaml" in result.stderr


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NNODES": "two"}, "NNODES='two' is not a number"),
        ({"NNODES": "2"}, "without a MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2"),
        ({"NNODES": "0"}, "NNODES=0"),
        ({"NNODES": "²"}, "NNODES='²' is not a number"),
        ({"NNODES": "2", "MASTER_ADDR": "h", "MASTER_PORT": "65536"}, "MASTER_PORT='65536' is not a number from 0 to"),
        ({"NNODES": "2", "MASTER_ADDR": "a b", "MASTER_PORT": "1"}, "MASTER_PORT: 'a b', 1"),
    ],
)
def test_wrong_node_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=expected):
        Nodes.from_environment()


def test_node_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert Nodes.from_environment() == Nodes(2, 1, "first:29500")


def test_a_first_node_that_nobody_knows(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=node0 is not known here: Name or service"):
        run_workers(load_config(run_yaml), Nodes(2, 1, "node0:29500"), "nothing", [])


def test_cores_are_shared_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vpmoe.runtime.device.has_gpu", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(9)))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    share_cores(2)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    share_cores(2)
    assert os.environ["OMP_NUM_THREADS"] == "4"
