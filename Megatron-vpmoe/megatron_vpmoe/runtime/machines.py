"""What machines can do: the one table of peaks, bandwidths and efficiencies, and the file that a calibration writes.

``machines.toml`` has the GPUs, each figure with its source; ``vpmoe plan --calibrate`` measures a CPU and writes the
same fields to a file of the user's (``calibrated_path``). Torch is not needed.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_vpmoe.errors import DeviceError, VpmoeError
from megatron_vpmoe.files import read_json

TABLE = Path(__file__).with_name("machines.toml")
KIND = "vpmoe calibrated machine"
"""What a calibrated file says of itself."""
Kind = Literal["product", "experts", "attention", "small", "wide", "memory", "link", "network"]
"""Of work: dense products, grouped ones, attention, batches of small matrices, products in fp32; what moves through
memory, between the GPUs of a node, between nodes."""
Curve = float | list[tuple[float, float]]
"""A share of a peak: one for all sizes, or (size, share), sizes rising, with the logarithm of the size between two."""
_GB = 1e9
_MOST_GPUS = 2**17


class Machine(BaseModel):
    """One kind of device, and how devices are joined."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    name: str
    match: list[str] = []
    """Parts of the name that its driver gives it."""
    bf16_tflops: float
    """Dense peak of products in bf16, without sparsity."""
    fp32_tflops: float
    """Of products in fp32, without TF32."""
    memory_gib: float
    memory_gb_s: float
    link_gb_s: float
    """From one device to the others of its node, one direction."""
    network_gb_s: float
    """From one device to those of other nodes, one direction."""
    node_gpus: int
    """Devices of a node."""
    usable: float
    """Share of the memory that a process can fill."""
    kernel_us: float
    """What a launch costs the device, beside what the kernel does."""
    launch_us: float
    """What a launch costs the host, which works ahead of the device."""
    beside: float = 1.0
    """Of a CPU: the share of its rates that each of several processes on it keeps."""
    efficiency: dict[Kind, Curve]
    """Share of the peak that work of each kind gets. Size of a product: its shortest side; of what moves: its bytes."""
    sources: dict[str, str]
    """Where each figure comes from; "peaks" stands for all that have no entry."""
    threads: int | None = None
    """Of a CPU: those that it was measured with."""

    def peak(self, *, bf16: bool) -> float:
        """FLOP/s of products."""
        return 1e12 * (self.bf16_tflops if bf16 else self.fp32_tflops)

    def rate(self, kind: Kind, size: float, *, bf16: bool = True) -> float:
        """FLOP/s or bytes/s that work of a kind gets at a size."""
        peaks = {"memory": _GB * self.memory_gb_s, "link": _GB * self.link_gb_s, "network": _GB * self.network_gb_s}
        peak = peaks[kind] if kind in peaks else self.peak(bf16=bf16 and kind != "wide")
        return peak * share_at(self.efficiency[kind], size)

    def source(self, figure: str) -> str:
        """Where a field or an efficiency comes from."""
        return self.sources.get(figure, self.sources["peaks"])

    @property
    def is_cpu(self) -> bool:
        """Whether it was calibrated, not read from the table."""
        return self.threads is not None


def share_at(curve: Curve, size: float) -> float:
    """The share of a peak at a size; beyond the ends of a curve that of its end."""
    if not isinstance(curve, list):
        return curve
    if size <= curve[0][0]:
        return curve[0][1]
    for (low, at_low), (high, at_high) in pairwise(curve):
        if size <= high:
            place = (math.log(size) - math.log(low)) / (math.log(high) - math.log(low))
            return at_low + place * (at_high - at_low)
    return curve[-1][1]


@functools.cache
def machines() -> dict[str, Machine]:
    """The table by name, in the order in which a device's name is looked for."""
    table = tomllib.loads(TABLE.read_text())
    every = table.pop("every_gpu")
    return {name: Machine.model_validate({**_under(every, own), "name": name}) for name, own in table.items()}


def _under(every: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    nested = {key: {**every[key], **own.get(key, {})} for key in ("efficiency", "sources")}
    return {**every, **own, **nested}


def machine_of(device_name: str) -> Machine | None:
    """The machine whose device a driver calls so; None: it is not in the table, or a part of a card (MIG)."""
    if " MIG " in device_name:
        return None
    found = (machine for machine in machines().values() for part in machine.match if part in device_name)
    return next(found, None)


class Fleet(BaseModel):
    """A number of equal devices.

    Attributes:
        machine: of each.
        gpus: how many; whole nodes, where there is more than one node.
    """

    model_config = ConfigDict(frozen=True)

    machine: Machine
    gpus: int

    @property
    def per_node(self) -> int:
        """Processes of a node."""
        return min(self.gpus, self.machine.node_gpus)

    @property
    def nodes(self) -> int:
        """Nodes."""
        return self.gpus // self.per_node

    def __str__(self) -> str:
        return f"{self.gpus}x{self.machine.name}"


def fleet(text: str) -> Fleet:
    """What "8xH100" says.

    Raises:
        DeviceError: another form, an unknown machine (names the known ones), or nodes that would not be whole.
    """
    known = ", ".join(sorted(machines()))
    remedy = f"COUNTxMACHINE, such as 8xH100; machines: {known}"
    found = re.fullmatch(r"(\d{1,6})[xX×](\S{1,64})", text.strip())
    if found is None or not 1 <= int(found[1]) <= _MOST_GPUS:
        raise DeviceError(f"{text[:80]!r} names no number of machines", source="--gpus", remedy=remedy)
    by_name = {name.casefold(): machine for name, machine in machines().items()}
    machine, count = by_name.get(found[2].casefold()), int(found[1])
    if machine is None:
        raise DeviceError(f"{found[2]!r} is no machine of the table", source="--gpus", remedy=remedy)
    if count > machine.node_gpus and count % machine.node_gpus:
        raise DeviceError(
            f"{count} are no whole nodes of {machine.node_gpus} {machine.name}", source="--gpus", remedy=remedy
        )
    return Fleet(machine=machine, gpus=count)


def calibrated_path() -> Path:
    """Where this machine's calibration lies: ``$XDG_CACHE_HOME/vpmoe`` (``~/.cache/vpmoe``), by the host's name."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    host = re.sub(r"[^A-Za-z0-9._-]", "_", platform.node()) or "localhost"
    return Path(home) / "vpmoe" / f"machine_{host}.json"


def calibrated(threads: int) -> Machine | None:
    """This CPU as it was measured with the nearest number of threads a process; None: it has not been.

    Raises:
        DeviceError: the file is damaged.
    """
    path, remedy = calibrated_path(), "measure again: vpmoe plan --calibrate"
    if not path.is_file():
        return None
    stored = read_json(path, error=DeviceError, remedy=remedy)
    try:
        found = [Machine.model_validate(each) for each in stored["machines"]]
        return min(found, key=lambda machine: abs((machine.threads or 1) - threads))
    except (KeyError, TypeError, ValueError, ValidationError) as cause:
        raise _damaged(path, remedy) from cause


def _damaged(path: Path, remedy: str) -> VpmoeError:
    return DeviceError("this is no calibrated machine", source=str(path), remedy=remedy)
