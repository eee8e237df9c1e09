"""``vpmoe plan``: a table, JSON and a picture of one plan; mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vpmoe.config import load_config
from megatron_vpmoe.planning.predict import SPLIT
from vpmoe.cli import main

SHORT = ["--num-layers=4", "--global-batch-size=16"]


@pytest.fixture
def config(repository: Path) -> str:
    return str(repository / "configs" / "vpmoe_stage1.yaml")


def test_json_says_what_the_table_does(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, drawn = tmp_path / "plan.json", tmp_path / "plan.png"
    words = ["plan", config, *SHORT, "--json", str(out), "--picture", str(drawn)]
    assert main([*words, "--gpus", "1xH100"]) == 0
    capsys.readouterr()
    # What it wrote, it replaces.
    assert main([*words, "--gpus", "4xH100", "--gpus", "8xH200", "--price", "2", "--top", "3"]) == 0
    shown, written = capsys.readouterr().out, json.loads(out.read_text())
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert {"4xH100", "8xH200"} == {each["gpus"] for each in written["layouts"]} == set(written["refused"])
    order = [(not each["fits"], each["step_seconds"]) for each in written["layouts"]]
    assert order == sorted(order)
    for each in written["layouts"]:
        assert set(each["seconds"]) == set(SPLIT)
        assert sum(each["seconds"].values()) == pytest.approx(each["step_seconds"])
        assert each["mfu_pct"] > 0 and each["memory_gib"] > 0
        gpus = int(each["gpus"].split("x")[0])
        assert each["days"] == pytest.approx(each["step_seconds"] * written["train_iters"] / 86400)
        assert each["cost"] == pytest.approx(each["days"] * 24 * gpus * 2)
        rate = written["tokens_per_step"] / each["step_seconds"] / gpus
        assert each["tokens_per_second_per_gpu"] == pytest.approx(rate)
    best = written["layouts"][0]
    assert best["reason"] == "" and f"{1e3 * best['step_seconds']:,.0f}" in shown
    cfg = load_config(config, [*SHORT, *best["flags"]], nodes=1)
    assert cfg.training.micro_batch_size == best["layout"]["micro_batch_size"]
    assert all(machine["sources"] for machine in written["machines"].values())
    assert "assumed" in shown and "refused" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        *((name, "1xA100-40GB") for name in ("nano_moe", "tiny", "small")),
        *((name, "1xH100") for name in ("medium", "moonlet")),
        *((name, "8xH100") for name in ("large", "moonlight")),
    ],
)
def test_small_mixtures_fit_the_machines_that_they_are_for(
    name: str, gpus: str, repository: Path, tmp_path: Path
) -> None:
    out, config = tmp_path / "plan.json", repository / "configs" / "nano_moe" / f"{name}.yaml"
    assert main(["plan", str(config), "--gpus", gpus, "--json", str(out)]) == 0
    best = json.loads(out.read_text())["layouts"][0]
    assert best["fits"] and best["tokens_per_second_per_gpu"] > 0


def test_what_does_not_fit_says_what_is_missing(config: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", config, "--global-batch-size=8", "--gpus", "1xA100-40GB", "--json", str(out)]) == 0
    layouts = json.loads(out.read_text())["layouts"]
    assert layouts and not any(each["fits"] for each in layouts)
    assert all("does not fit: " in each["reason"] and "GiB" in each["reason"] for each in layouts)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "8xH300"], "machines: "),
        (["--gpus", "H100"], "COUNTxMACHINE"),
        (["--gpus", "8xH100", "--no-such-field", "3"], "no-such-field"),
        ([], "--calibrate"),
    ],
)
def test_mistakes_are_named(
    words: list[str],
    said: str,
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["plan", config, *words]) == 2
    assert said in capsys.readouterr().err


def test_no_configuration_and_somebody_else_s_file(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan"]) == 2
    (tmp_path / "theirs.json").write_text("{}")
    assert main(["plan", config, *SHORT, "--gpus", "1xH100", "--json", str(tmp_path / "theirs.json")]) == 2
    assert (tmp_path / "theirs.json").read_text() == "{}"
    assert "made by vpmoe" in capsys.readouterr().err
