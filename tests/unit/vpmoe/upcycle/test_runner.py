"""Jobs: inputs are checked, interrupted runs go on, finished ones are left alone, stale and foreign ones refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny_qwen3 import write_qwen3
from vpmoe.errors import NotOursError, UpcycleError, WeightsError
from vpmoe.upcycle import runner
from vpmoe.upcycle.app import app
from vpmoe.upcycle.import_qwen3 import ImportQwen3
from vpmoe.upcycle.ladder_file import Ladder, geometry, read_ladder

LADDER = """
folder = "{root}"
[objects.tiny_hf]
rung = 0
origin = "somewhere"
{pin}

[objects.tiny]
rung = 1
config = "{repository}/configs/qwen3_0_6b.yaml"
job = "import_qwen3"
inputs = {{ source = "tiny_hf" }}
settings = {{ prompt_lengths = [3], greedy_steps = {steps}, logit_tolerance = {tolerance} }}

[objects.tiny.overrides]
num_layers = 1
hidden_size = 16
ffn_hidden_size = 24
num_attention_heads = 2
num_query_groups = 1
kv_channels = {head_dim}
padded_vocab_size = 64
"""
SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 50,
}


def write_ladder(root: Path, repository: Path, **changes: object) -> Ladder:
    values = {"pin": "", "head_dim": 8, "steps": 2, "tolerance": 1e-4, **changes}
    (root / "ladder.toml").write_text(LADDER.format(root=root, repository=repository, **values))
    return read_ladder(root / "ladder.toml")


@pytest.fixture
def ladder(tmp_path: Path, repository: Path) -> Ladder:
    write_qwen3(tmp_path / "tiny_hf", **SMALL)
    return write_ladder(tmp_path, repository)


def make(ladder: Ladder, **options: bool) -> dict:
    return runner.run(runner.plan(ladder, "tiny"), quiet=True, **options)


def due(ladder: Ladder) -> str | None:
    return runner.plan(ladder, "tiny").step.state().due


@pytest.mark.slow
def test_made_once_then_left_alone_then_stale(ladder: Ladder, tmp_path: Path, repository: Path) -> None:
    receipt = make(ladder)
    report = receipt["report"]
    assert report["verification"]["parity"]["greedy_identical"]
    assert report["verification"]["reimport_bit_identical"]
    assert report["conversion"] == {"vocab_size": 50, "padding_rows": 14}
    made = tmp_path / "tiny"
    assert {path.name for path in made.iterdir()} == {"megatron", "hf", "receipt.json"}
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert make(ladder) == receipt
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before

    changed = write_ladder(tmp_path, repository, steps=3)
    with pytest.raises(NotOursError, match=r"settings\.greedy_steps: 2 -> 3"):
        make(changed)
    again = make(changed, overwrite=True)
    assert again["key"] != receipt["key"]
    assert again["report"]["weights_sha256"] == report["weights_sha256"]

    shard = made / "hf" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    answer = CliRunner().invoke(app, ["check", "tiny", "--ladder", str(tmp_path / "ladder.toml")])
    assert isinstance(answer.exception, UpcycleError) and "hf/model.safetensors does not have" in answer.output


def test_a_mended_conversion_makes_the_object_stale(ladder: Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    make(ladder)
    version = ImportQwen3.version
    monkeypatch.setattr(ImportQwen3, "version", version + 1)
    assert due(ladder) == f"it was made under another key: job.version: {version} -> {version + 1}"
    monkeypatch.undo()
    assert due(ladder) is None
    monkeypatch.setattr("vpmoe.steps.step.package_versions", lambda names: dict.fromkeys(names, "another"))
    assert "packages.transformers" in str(due(ladder))


@pytest.mark.slow
def test_an_interrupted_run_goes_on(ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "write_hf_directory", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(ladder)
    assert not (tmp_path / "tiny").exists()
    planned = runner.plan(ladder, "tiny")
    monkeypatch.setattr(type(planned.job), "convert", interrupted)
    receipt = runner.run(planned, quiet=True)
    assert receipt["report"]["conversion"]["vocab_size"] == 50
    assert not (tmp_path / "tiny.partial").exists()


def test_unfinished_work_of_other_settings_survives(
    ladder: Ladder, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What days have gone into is kept until somebody asks for it to go; the message says what was changed."""

    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "write_hf_directory", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(ladder)
    partial = tmp_path / "tiny.partial"
    before = {path: path.stat().st_mtime_ns for path in partial.rglob("*")}
    changed = write_ladder(tmp_path, repository, steps=3)
    with pytest.raises(NotOursError, match=r"settings\.greedy_steps: 2 -> 3"):
        make(changed)
    assert {path: path.stat().st_mtime_ns for path in partial.rglob("*")} == before
    make(changed, overwrite=True)
    assert not partial.exists()


def test_what_is_not_ours_survives_even_when_asked(ladder: Ladder, tmp_path: Path) -> None:
    foreign = tmp_path / "tiny"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(NotOursError, match=r"holds thesis\.tex"):
        make(ladder, overwrite=True)
    assert (foreign / "thesis.tex").read_text() == "years of work"
    partial = tmp_path / "tiny.partial"
    foreign.rename(partial)
    with pytest.raises(NotOursError, match=r"it has no unfinished\.json"):
        make(ladder, overwrite=True)
    assert (partial / "thesis.tex").read_text() == "years of work"


def test_inputs_that_are_not_what_was_declared(ladder: Ladder, tmp_path: Path, repository: Path) -> None:
    pinned = write_ladder(tmp_path, repository, pin='sha256 = { "model.safetensors" = "0" }')
    with pytest.raises(UpcycleError, match="0 is declared"):
        runner.plan(pinned, "tiny")
    with pytest.raises(WeightsError, match="kv_channels: 8, expected 16"):
        make(write_ladder(tmp_path, repository, head_dim=16))
    (tmp_path / "tiny_hf" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="not found"):
        runner.plan(ladder, "tiny")


def test_a_failed_verification_leaves_no_object(ladder: Ladder, tmp_path: Path, repository: Path) -> None:
    assert json.loads((tmp_path / "tiny_hf" / "config.json").read_text())["vocab_size"] == 50
    with pytest.raises(UpcycleError, match="not the same model"):
        make(write_ladder(tmp_path, repository, tolerance=1e-30))
    assert not (tmp_path / "tiny").exists()


def test_a_ladder_names_all_its_faults(tmp_path: Path) -> None:
    (tmp_path / "schema.toml").write_text(
        'colour = 1\n[objects.a]\nrung = "one"\n[objects.c]\nrung = 0\nkind = "sauce"\n[evaluation]\ndocuments = 0\n'
    )
    (tmp_path / "sense.toml").write_text(
        'target = "z"\n[objects.a]\nrung = 1\njob = "heal"\ninputs = { model = "b" }\n'
        '[objects.c]\nrung = 0\ninputs = { model = "a" }\n[objects.d]\nrung = 1\njob = "heal"\norigin = "x"\n'
    )
    for name, expected in (
        ("schema", ("colour: Extra", "objects.a.rung", "objects.c.kind", "evaluation.documents", "evaluation.texts")),
        (
            "sense",
            (
                "objects.a.inputs: there is no object 'b'",
                "objects.a.config: neither it nor its input b says one",
                "objects.c.job: what has inputs or settings needs one",
                "objects.d.sha256, revision, origin",
                "objects.d.config: an object that a job makes needs it",
                "target: there is no object 'z'",
            ),
        ),
    ):
        with pytest.raises(UpcycleError) as caught:
            read_ladder(tmp_path / f"{name}.toml")
        assert [text for text in expected if text not in str(caught.value)] == []


def test_settings_of_another_job_are_named_with_their_place(ladder: Ladder, tmp_path: Path) -> None:
    text = ladder.path.read_text().replace("greedy_steps", "greedy_stops")
    ladder.path.write_text(text)
    with pytest.raises(UpcycleError, match=r"(?s)greedy_stops: Extra.*ladder.toml, objects.tiny.settings"):
        runner.plan(read_ladder(ladder.path), "tiny")
    ladder.path.write_text(text.replace('"import_qwen3"', '"import_qwen4"'))
    with pytest.raises(UpcycleError, match="no job 'import_qwen4'"):
        runner.plan(read_ladder(ladder.path), "tiny")


@pytest.mark.parametrize("name", ["configs/upcycle/ladder.toml", "configs/nano/ladder.toml"])
def test_the_tracked_ladders_are_sound(repository: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Six rungs and three stages in their order, every geometry and every job's settings read."""
    monkeypatch.chdir(repository)
    ladder = read_ladder(Path(name))
    for spec in ladder.objects.values():
        geometry(spec)
        if not spec.is_source:
            runner.job_and_settings(ladder, spec)
    assert ladder.target and ladder.evaluation
    chain = ladder.chain(ladder.target)
    assert chain[-1].id == ladder.target
    rungs = [spec.rung for spec in chain if spec.rung]
    assert rungs == sorted(rungs) and set(rungs) == set(range(1, 10))
    used = {name for spec in ladder.objects.values() for name in spec.inputs.values()} | {ladder.target}
    assert used == set(ladder.objects), "an object that nothing leads to"
