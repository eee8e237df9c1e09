"""``vpmoe model describe``: the table tells every layer once, JSON adds up, the picture is of this configuration."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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
from vpmoe.describe.layers import alike, kinds, numbers_of
from vpmoe.describe.picture import columns
from vpmoe.describe.table import cache_bytes, print_description

NAMES = (
    "vpmoe_stage1.yaml", "vpdense_80.yaml", "vpdense_28.yaml", "vpdense0_5_28.yaml", "qwen3_0_6b.yaml",
    "nano/stage1.yaml", "nano/vpmoe_16.yaml", "nano/vpdense_8.yaml",
    *(f"nano_moe/{name}.yaml" for name in ("nano_moe", "tiny", "small", "medium", "large", "moonlet", "moonlight")),
    "think/transformer.yaml", "think/state_space.yaml",
)  # fmt: skip


@pytest.fixture(params=NAMES)
def cfg(request: pytest.FixtureRequest, repository: Path) -> RunConfig:
    return load_config(repository / "configs" / request.param)


def table_of(cfg: RunConfig, width: int = 220, **options: bool) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_description(cfg, "a name", console, **options)
    return console.export_text()


def test_every_layer_is_of_one_kind(cfg: RunConfig) -> None:
    layers = layer_geometries(cfg)
    found = kinds(layers)
    assert sorted(layer.number for members in found for layer in members) == [layer.number for layer in layers]
    assert all(alike(layer) == alike(members[0]) for members in found for layer in members)
    assert len({alike(members[0]) for members in found}) == len(found)


@pytest.mark.parametrize(
    ("layers", "frequency", "expected"),
    [
        (80, 4, ["1", "2-3, 5-7, ..., 77-79", "4, 8, ..., 80"]),
        (30, 4, ["1", "2-3, 5-7, ..., 29-30", "4, 8, ..., 28"]),
        (6, 2, ["1", "2, 4, 6", "3, 5"]),
        (3, 9, ["1", "2-3"]),
        (1, 2, ["1"]),
    ],
)
def test_rows_of_the_table(repository: Path, layers: int, frequency: int, expected: list[str]) -> None:
    flags = ["--num-layers", str(layers), "--window-attn-skip-freq", str(frequency)]
    flags += ["--no-value-residual", "--first-dense-layers", "0", "--router-dead-experts-warn", "null"] * (layers == 1)
    stack = layer_geometries(load_config(repository / "configs" / "vpmoe_stage1.yaml", flags))
    assert [numbers_of(members) for members in kinds(stack)] == expected


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
    of_others = {"ssm_inner_size", "ssm_state_size", "ssm_conv_size", "ssm_step_rank", "diffusion_levels", "ddim_steps"}
    of_others |= {"mixture_experts", "kv_lora_rank", "qk_pos_emb_head_dim", "memory_entries"}
    assert told["idle_fields"].keys() == {"moe_router_num_groups"} | of_others


def test_a_wrong_configuration_is_one_message(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = repository / "configs" / "vpmoe_stage1.yaml"
    assert main(["model", "describe", str(path), "--window-size", "null", "--hiden-size", "8"]) == 2
    said = capsys.readouterr().err
    assert "--hiden-size" in said and "--hidden-size" in said and "Traceback" not in said
    assert main(["model", "describe", str(path), "--window-size", "null"]) == 2
    said = capsys.readouterr().err
    assert "model.tpa" in said and "model.window_size" in said and "Traceback" not in said


def test_the_picture_shows_every_layer(repository: Path) -> None:
    attention, feed_forward = columns(load_config(repository / "configs" / "vpmoe_stage1.yaml"))
    assert [number for number, (_, words) in enumerate(attention, 1) if words.startswith("global, GQA, GRAPE-A")] == [
        *range(4, 81, 4)
    ]
    assert [number for number, (_, words) in enumerate(feed_forward, 1) if words.startswith("dense 512")] == [1]
    assert len({colour for colour, _ in attention + feed_forward}) == 4


@pytest.mark.parametrize("name", ["stack.svg", "stack.png"])
def test_the_picture_is_written(name: str, repository: Path, tmp_path: Path, capsys) -> None:
    path, config = tmp_path / "new" / name, str(repository / "configs" / "nano" / "stage1.yaml")
    drawn = []
    for _ in range(2):
        assert main(["model", "describe", config, "--picture", str(path)]) == 0
        assert str(path) in capsys.readouterr().out
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1] and (b"<svg" in drawn[0] or drawn[0].startswith(b"\x89PNG"))
    path.write_text("a picture of a user's own")
    assert main(["model", "describe", config, "--picture", str(path)]) == 2
    assert "own" in path.read_text() and name in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/proc/nowhere/stack.svg", "stack.txt"])
def test_a_picture_that_cannot_be_written(path: str, repository: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["model", "describe", str(repository / "configs" / "nano" / "stage1.yaml"), "--picture", path]) == 2
    said = capsys.readouterr().err
    assert path in said and "Traceback" not in said


def test_combinations_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "combinations"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "refused because" in said and "tpa" in said and "Idle" in said


def test_describing_needs_no_torch(repository: Path) -> None:
    code = "import sys; from vpmoe.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "model", "describe", str(repository / "configs" / "qwen3_0_6b.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False")
