"""``vpmoe make-plots`` and the figures of ``vpmoe runs plot`` as a user gives them, on runs that trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests import training_runs
from tests.mini_dataset import PADDED_VOCAB, SEQ_LENGTH, write_mini
from vpmoe.cli import main
from vpmoe.runs.panels import FIGURES

OF_MODELS = {"kv_throughput_mean", "expert_usage_mean", "first_choice_confidence_mean"}


def test_the_figures_of_runs_and_of_their_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, store = write_mini(tmp_path / "data") / "dataset", tmp_path / "registry.sqlite"
    fields = {"padded_vocab_size": PADDED_VOCAB, "seq_length": SEQ_LENGTH, "train_iters": 6, "lr_warmup_iters": 1}
    fields |= {"save_interval": 6, "eval_interval": 3, "eval_iters": 1}
    for name, more in (("first", {}), ("dense", {"num_experts": None})):
        run = {"run_store": store, "run_name": name, **fields, **more}
        assert training_runs.train(tmp_path / name, dataset, **run).returncode == 0
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "figs"
    prompts.write_text("".join(json.dumps({"prompt": f"{number} + 2"}) + "\n" for number in range(3)))
    words = ["--prompts", str(prompts), "--output-dir", str(output), "--max-new-tokens", "4", "--store", str(store)]
    # Whatever is refused is refused before anything is written.
    output.mkdir()
    (output / "expert_usage_mean.png").write_bytes(b"mine")
    assert main(["make-plots", "first", *words]) == 2
    assert "NotOursError" in capsys.readouterr().err and len([*output.iterdir()]) == 1
    (output / "expert_usage_mean.png").unlink()

    assert main(["make-plots", "first", "--passage", "dense", *words]) == 2
    assert "none of those drawn" in capsys.readouterr().err and not any(output.iterdir())

    for names in (["dense"], ["first", "dense", "--passage", "dense"]):  # what is ours is replaced
        assert main(["make-plots", *names, *words]) == 0
    told = capsys.readouterr().err
    assert "dense: no max_load" in told and "dense: not in expert_usage_mean, it has no experts" in told
    report = json.loads((output / "figures.json").read_text())
    trained = {f"{run}_{figure}.png" for run in ("first", "dense") for figure in FIGURES} - {"dense_max_load.png"}
    assert {name for names in report["figures"].values() for name in names} == {
        *trained,
        *(f"{figure}.png" for figure in OF_MODELS),
    }
    assert {path.name for path in output.iterdir()} == {
        "figures.json",
        *(name for names in report["figures"].values() for name in names),
    }
    assert all(min(Image.open(path).size) > 300 for path in output.glob("*.png"))
    assert report["provenance"]["config_hash"].keys() == report["runs"].keys() == {"first", "dense"}
    assert report["prompts"]["count"] == 3
    assert {"lr", "loss/total", "valid/loss/total", "throughput/tokens_per_second"} <= {
        *report["runs"]["dense"]["last_values"]
    }
    first, bare = (report["runs"][name]["over_prompts"] for name in ("first", "dense"))
    assert (
        (first["form"], bare["form"]) == ("conversation", "passage")
        and bare["layers"] == {}
        and [*first["layers"]] == ["2", "3", "4"]
    )
    for layer in first["layers"].values():
        assert sum(layer["usage"]["mean"]) == pytest.approx(1)
        assert 0.5 <= layer["first_choice"]["mean"] <= 1
    assert first["tokens_per_second"]["on"]["mean"] > 0 and report["runs"]["first"]["checkpoint"]["iteration"] == 6

    picture = ["--output", str(tmp_path / "p.png"), "--store", str(store)]
    figures = [word for figure in FIGURES for word in ("--figure", figure)]
    assert main(["runs", "plot", "first", "dense", *figures, "--smoothing", "0.5", *picture]) == 0
    assert "6 fields of 2 runs" in capsys.readouterr().out and min(Image.open(tmp_path / "p.png").size) > 700
    assert main(["runs", "plot", "dense", "--figure", "max_load", *picture]) == 2
    assert "no run has recorded moe/router_agg/max_load_pct" in capsys.readouterr().err
