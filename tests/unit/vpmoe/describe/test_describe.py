"""``vpmoe model describe``: the table tells every layer once, JSON adds up, the picture is of this configuration."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.console import Console

from megatron_vpmoe.config import (
    RunConfig,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    layer_geometries,
    load_config,
    parameter_count,
)
from vpmoe.cli import main
from vpmoe.describe.cards import COLOURS, attention_kind, feed_forward_kind
from vpmoe.describe.layers import alike, fold, numbers_of
from vpmoe.describe.picture import stack_picture
from vpmoe.describe.table import cache_bytes, print_description

NAMES = (
    "vpmoe_stage1.yaml", "vpdense_80.yaml", "vpdense_28.yaml", "vpdense0_5_28.yaml", "qwen3_0_6b.yaml",
    "nano/stage1.yaml", "nano/vpmoe_16.yaml", "nano/vpdense_8.yaml",
)  # fmt: skip


@pytest.fixture(params=NAMES)
def cfg(request: pytest.FixtureRequest, repository: Path) -> RunConfig:
    return load_config(repository / "configs" / request.param)


def table_of(cfg: RunConfig, width: int = 220, **options: bool) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_description(cfg, "a name", console, **options)
    return console.export_text()


def test_folding_unfolds_to_the_stack(cfg: RunConfig) -> None:
    layers = layer_geometries(cfg)
    told = {}
    for folded in fold(layers):
        for repetition in range(folded.times):
            for run in folded.runs:
                for k in range(run.count):
                    number = run.first + repetition * folded.stride + k
                    assert number not in told
                    told[number] = alike(run.layer)
    assert told == {layer.number: alike(layer) for layer in layers}


@pytest.mark.parametrize(
    ("layers", "frequency", "expected"),
    [
        (80, 4, ["1", "2-3", "4", "5-7, 9-11, ..., 77-79", "8, 12, ..., 80"]),
        (30, 4, ["1", "2-3", "4", "5-7, 9-11, ..., 25-27", "8, 12, ..., 28", "29-30"]),
        (6, 2, ["1", "2", "3, 5", "4, 6"]),
        (3, 9, ["1", "2-3"]),
        (1, 2, ["1"]),
    ],
)
def test_rows_of_the_folded_table(repository: Path, layers: int, frequency: int, expected: list[str]) -> None:
    flags = ["--num-layers", str(layers), "--window-attn-skip-freq", str(frequency)]
    flags += ["--no-value-residual", "--no-first-layer-dense", "--router-dead-experts-warn", "null"] * (layers == 1)
    stack = layer_geometries(load_config(repository / "configs" / "vpmoe_stage1.yaml", flags))
    assert [numbers_of(run, folded) for folded in fold(stack) for run in folded.runs] == expected


def test_every_layer_has_a_row_on_demand(repository: Path) -> None:
    cfg = load_config(repository / "configs" / "vpmoe_stage1.yaml")
    rows = [line.split() for line in table_of(cfg, every_layer=True).splitlines()]
    kinds = {int(row[0]): row[1] for row in rows if len(row) > 5 and row[0].isdigit()}
    assert kinds == {n: "global" if n % 4 == 0 else "local" for n in range(1, 81)}


def test_the_table_has_the_figures_of_the_geometry(cfg: RunConfig) -> None:
    text, count = table_of(cfg), parameter_count(cfg)
    for value in (count.total, count.active, count.active_without_embeddings, kv_cache_bytes_per_token(cfg)):
        assert f"{value:,}" in text
    for layer in layer_geometries(cfg):
        row = [f"{layer.parameters:,}", f"{layer.active_parameters:,}", f"{layer.cache_bytes:,}"]
        row.append(f"{layer.flops(cfg.data.seq_length) / 1e6:,.2f}")
        assert any(line.split()[-4:] == row for line in text.splitlines())
    assert f"{forward_flops_per_token(cfg) / 1e6:,.2f} M a token forward" in text


def test_the_table_fits_a_narrow_terminal(cfg: RunConfig) -> None:
    """Nothing is cut off at 80 columns, nor with every digit at 100."""
    assert "…" not in table_of(cfg, width=100)
    assert "…" not in table_of(cfg, width=80)
    assert max(len(line) for line in table_of(cfg, width=80).splitlines()) <= 80


def test_json_adds_up(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = repository / "configs" / "vpmoe_stage1.yaml"
    assert main(["model", "describe", str(path), "--json", "--seq-length", "4096"]) == 0
    told = json.loads(capsys.readouterr().out)
    cfg = load_config(path, ["--seq-length", "4096"])
    layers, totals = told["layers"], told["totals"]
    around = told["parts"]["embedding"] + told["parts"]["output layer"] + cfg.model.hidden_size
    assert sum(layer["parameters"] for layer in layers) + around == totals["parameters"] == parameter_count(cfg).total
    assert sum(layer["active_parameters"] for layer in layers) + around == totals["active_parameters"]
    flops = sum(layer["flops_per_token"] for layer in layers) + told["output_layer_flops_per_token"]
    assert flops == pytest.approx(totals["forward_flops_per_token"])
    assert [layer["layer"] for layer in layers if layer["kind"] == "global"] == list(range(4, 81, 4))
    assert [layer["layer"] for layer in layers if layer["feed_forward"] == "dense"] == [1]
    assert totals["kv_bytes_at_seq_length"] == cache_bytes(cfg, 4096) == 1024 * (20 * 4096 + 60 * 127)
    assert told["idle_fields"].keys() == {"moe_router_num_groups"}


def test_a_wrong_configuration_is_one_message(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = repository / "configs" / "vpmoe_stage1.yaml"
    assert main(["model", "describe", str(path), "--window-size", "null", "--hiden-size", "8"]) == 2
    said = capsys.readouterr().err
    assert "--hiden-size" in said and "--hidden-size" in said and "Traceback" not in said
    assert main(["model", "describe", str(path), "--window-size", "null"]) == 2
    said = capsys.readouterr().err
    assert "model.tpa" in said and "model.window_size" in said and "Traceback" not in said


def test_the_picture_shows_every_layer_in_its_colours(cfg: RunConfig) -> None:
    root = ElementTree.fromstring(stack_picture(cfg))
    bars = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("x") == "84" and e.get("width") == "112"]
    strips = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("x") == "202"]
    from_below = sorted(range(len(bars)), key=lambda i: -float(bars[i].get("y") or 0))
    layers = layer_geometries(cfg)
    assert [bars[i].get("fill") for i in from_below] == [COLOURS[attention_kind(layer)] for layer in layers]
    assert [strips[i].get("fill") for i in from_below] == [COLOURS[feed_forward_kind(layer)] for layer in layers]
    view = [float(v) for v in (root.get("viewBox") or "").split()]
    for element in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, width, height = (float(element.get(key) or 0) for key in ("x", "y", "width", "height"))
        assert x >= 0 and x + width <= view[2] and y >= 0 and y + height <= view[3]
        assert width > 0 and height > 0


def test_the_documented_picture_is_up_to_date(repository: Path) -> None:
    """Made by: vpmoe model describe configs/vpmoe_stage1.yaml --svg docs/images/vpmoe.svg"""
    drawn = stack_picture(load_config(repository / "configs" / "vpmoe_stage1.yaml"))
    assert (repository / "docs" / "images" / "vpmoe.svg").read_text() == drawn
    assert "images/vpmoe.svg" in (repository / "docs" / "architecture.md").read_text()


def test_svg_is_written(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "stack.svg"
    assert main(["model", "describe", str(repository / "configs" / "nano" / "stage1.yaml"), "--svg", str(path)]) == 0
    assert path.read_text().startswith("<svg") and str(path) in capsys.readouterr().out


def test_a_picture_that_cannot_be_written(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(repository / "configs" / "nano" / "stage1.yaml")
    assert main(["model", "describe", config, "--svg", "/proc/nowhere/stack.svg"]) == 2
    said = capsys.readouterr().err
    assert "/proc/nowhere/stack.svg" in said and "Traceback" not in said


def test_combinations_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "combinations"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "refused" in said and "tpa" in said and "Idle" in said


def test_describing_needs_no_torch(repository: Path) -> None:
    code = "import sys; from vpmoe.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "model", "describe", str(repository / "configs" / "qwen3_0_6b.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False")
