"""The table of machines: every figure has a source, a device finds its line, a fleet is whole nodes or is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.files import json_bytes, write_atomically
from megatron_vpmoe.runtime import device
from megatron_vpmoe.runtime.machines import calibrated, calibrated_path, fleet, machine_of, machines, share_at

# As drivers call them.
NAMES = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100-PCIe",
    "NVIDIA H100 NVL": "H100-NVL",
    "NVIDIA H200": "H200",
    "NVIDIA H200 NVL": "H200-NVL",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100-SXM4-40GB": "A100-40GB",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
}


@pytest.mark.parametrize(("name", "machine"), NAMES.items())
def test_a_device_finds_its_line(name: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine_of(name)
    assert found is not None and found.name == machine
    monkeypatch.setattr(device, "device_name", lambda: name)
    assert device.peak_flops(bf16=True) == 1e12 * found.bf16_tflops
    assert device.peak_bandwidth() == 1e9 * found.memory_gb_s


@pytest.mark.parametrize("name", ["CPU", "NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"])
def test_an_unknown_device_has_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "device_name", lambda: name)
    assert machine_of(name) is device.peak_flops(bf16=True) is device.peak_bandwidth() is None


@pytest.mark.parametrize("name", sorted(machines()))
def test_every_figure_is_possible_and_has_a_source(name: str) -> None:
    machine = machines()[name]
    for kind, share in machine.efficiency.items():
        assert isinstance(share, float) and 0 < share <= 1
        assert kind in machine.sources, "an efficiency that nobody states is assumed, and says so"
    assert machine.source("peaks") and machine.source("network_gb_s") and 0 < machine.usable <= 1
    assert machine.peak(bf16=False) < machine.peak(bf16=True)


@pytest.mark.parametrize(
    "text", ["", "H100", "x", "0xH100", "-1xH100", "8 H100", "8xH100xH100", "9" * 7 + "xH100", "8x", "12xH100"]
)
def test_what_names_no_fleet_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="COUNTxMACHINE") as refused:
        fleet(text)
    assert all(name in str(refused.value) for name in machines())


def test_an_unknown_machine_is_answered_with_the_known_ones() -> None:
    with pytest.raises(DeviceError, match=re.escape("'H300' is no machine")) as refused:
        fleet("8xH300")
    assert all(name in str(refused.value) for name in machines())


@pytest.mark.parametrize(
    ("text", "nodes", "per_node"), [("4xH100", 1, 4), ("8xh100", 1, 8), ("64xH200", 8, 8), ("8xGB200", 2, 4)]
)
def test_a_fleet_is_whole_nodes(text: str, nodes: int, per_node: int) -> None:
    made = fleet(text)
    assert (made.nodes, made.per_node) == (nodes, per_node) and made.gpus == nodes * per_node


def test_a_share_lies_between_its_neighbours() -> None:
    curve = [(4.0, 0.1), (64.0, 0.5), (256.0, 0.4)]
    assert share_at(0.7, 3) == 0.7
    assert share_at(curve, 1) == 0.1 and share_at(curve, 1e9) == 0.4
    assert share_at(curve, 64) == 0.5 and share_at(curve, 16) == pytest.approx(0.3)


def test_a_calibrated_machine_is_the_one_of_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibrated(1) is None
    one = machines()["H100"].model_copy(update={"name": "CPU", "threads": 1, "efficiency": {"product": [(4.0, 0.5)]}})
    stored = [machine.model_dump(mode="json") for machine in (one, one.model_copy(update={"threads": 16}))]
    write_atomically(calibrated_path(), json_bytes({"machines": stored}))
    found = calibrated(1)
    assert found == one and found.is_cpu and not machines()["H100"].is_cpu
    assert [getattr(calibrated(threads), "threads", None) for threads in (2, 12, 64)] == [1, 16, 16]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"machines": []}', b'{"machines": [{"name": "CPU"}]}'])
def test_a_damaged_calibration_is_named(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_atomically(calibrated_path(), content)
    with pytest.raises(DeviceError, match="--calibrate"):
        calibrated(1)
