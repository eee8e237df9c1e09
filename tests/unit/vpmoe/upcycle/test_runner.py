"""Jobs: inputs are checked, interrupted runs go on, finished ones are left alone, stale ones refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny_qwen3 import write_qwen3
from vpmoe.errors import UpcycleError, WeightsError
from vpmoe.upcycle import runner
from vpmoe.upcycle.app import app
from vpmoe.upcycle.registry import Registry, load_registry

OBJECTS = """
[tiny_hf]
kind = "source"
rung = 0
path = "{root}/tiny_hf"
origin = "somewhere"
{pin}

[tiny]
kind = "derived"
rung = 1
path = "{root}/tiny"
config = "{repository}/configs/qwen3_0_6b.yaml"
job = "{root}/tiny.toml"
inputs = {{ source = "tiny_hf" }}

[tiny.overrides]
num_layers = 1
hidden_size = 16
ffn_hidden_size = 24
num_attention_heads = 2
num_query_groups = 1
kv_channels = {head_dim}
padded_vocab_size = 64
"""
JOB = 'object = "tiny"\njob = "import_qwen3"\n[settings]\nprompt_lengths = [3]\ngreedy_steps = {steps}\n'
SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 50,
}


def write_registry(root: Path, repository: Path, *, pin: str = "", head_dim: int = 8, steps: int = 2) -> Registry:
    text = OBJECTS.format(root=root, repository=repository, pin=pin, head_dim=head_dim)
    (root / "objects.toml").write_text(text)
    (root / "tiny.toml").write_text(JOB.format(steps=steps))
    return load_registry(root / "objects.toml")


@pytest.fixture
def registry(tmp_path: Path, repository: Path) -> Registry:
    write_qwen3(tmp_path / "tiny_hf", **SMALL)
    return write_registry(tmp_path, repository)


def make(registry: Registry, **options: bool) -> dict:
    return runner.run(runner.plan(registry, "tiny"), quiet=True, **options)


def test_made_once_then_left_alone_then_stale(registry: Registry, tmp_path: Path, repository: Path) -> None:
    receipt = make(registry)
    assert receipt["verification"]["parity"]["greedy_identical"]
    assert receipt["verification"]["reimport_bit_identical"]
    assert receipt["report"] == {"vocab_size": 50, "padding_rows": 14}
    made = tmp_path / "tiny"
    assert {path.name for path in made.iterdir()} == {"megatron", "hf", "receipt.json"}
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert make(registry) == receipt
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before

    changed = write_registry(tmp_path, repository, steps=3)
    with pytest.raises(UpcycleError, match="made from other inputs, settings or geometry"):
        make(changed)
    again = make(changed, force=True)
    assert again["key"] != receipt["key"]
    assert again["outputs"]["weights_sha256"] == receipt["outputs"]["weights_sha256"]

    shard = made / "hf" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    answer = CliRunner().invoke(app, ["check", "tiny", "--objects", str(tmp_path / "objects.toml")])
    assert isinstance(answer.exception, UpcycleError) and "hf/model.safetensors does not have" in answer.output


def test_an_interrupted_run_goes_on(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "export_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(registry)
    assert not (tmp_path / "tiny").exists()
    planned = runner.plan(registry, "tiny")
    monkeypatch.setattr(type(planned.job), "convert", interrupted)
    receipt = runner.run(planned, quiet=True)
    assert receipt["report"]["vocab_size"] == 50
    assert not (tmp_path / "tiny.partial").exists()


def test_inputs_that_are_not_what_was_registered(registry: Registry, tmp_path: Path, repository: Path) -> None:
    pinned = write_registry(tmp_path, repository, pin='sha256 = { "model.safetensors" = "0" }')
    with pytest.raises(UpcycleError, match="the registry says 0"):
        runner.plan(pinned, "tiny")
    with pytest.raises(WeightsError, match="kv_channels: 8, expected 16"):
        make(write_registry(tmp_path, repository, head_dim=16))
    (tmp_path / "tiny_hf" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="not found"):
        runner.plan(registry, "tiny")


def test_a_failed_verification_leaves_no_object(registry: Registry, tmp_path: Path) -> None:
    config = tmp_path / "tiny_hf" / "config.json"
    job = tmp_path / "tiny.toml"
    job.write_text(job.read_text() + "logit_tolerance = 1e-30\n")
    assert json.loads(config.read_text())["vocab_size"] == 50
    with pytest.raises(UpcycleError, match="not the same model"):
        make(registry)
    assert not (tmp_path / "tiny").exists()


def test_a_registry_names_all_its_faults(tmp_path: Path) -> None:
    derived = '[a]\nkind = "derived"\nrung = 1\npath = "a"\ninputs = { source = "b" }\n'
    (tmp_path / "objects.toml").write_text(derived + '[c]\nkind = "sauce"\nrung = 0\npath = "c"\n')
    with pytest.raises(UpcycleError) as caught:
        load_registry(tmp_path / "objects.toml")
    text = str(caught.value)
    assert "a.job: a derived object needs it" in text and "there is no object 'b'" in text and "c.kind" in text


def test_the_tracked_registry_is_sound(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    from vpmoe.upcycle.registry import geometry

    registry = load_registry()
    for spec in registry.objects.values():
        geometry(spec)
        if spec.job is not None:
            job, _ = runner._read_job(spec)
            assert set(job.roles) == set(spec.inputs), spec.id
    rungs = [spec.rung for spec in registry.chain("qwen3-0_6B")]
    assert rungs == sorted(rungs)
