"""Routed experts in the narrow formats that the card has kernels for: right as the format can be, and their time."""

from __future__ import annotations

import contextlib

import torch

from megatron_vpmoe.config.expert_formats import FORMATS
from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.profiling.stopwatch import seconds, spread
from megatron_vpmoe.runtime.device import compute_capability, current_device
from megatron_vpmoe.runtime.expert_formats import check_format
from scripts.bench.moe import Side
from scripts.gpu.experts import DRY, SMALL, MoEAuxLossAutoScaler, configuration, layer_of, numbers_of
from scripts.gpu.frame import Findings, Numbers

FROM_BF16, FROM_EMULATION = 0.1, 0.03
"""Two operands of four bits a product, two products deep; the same rounding of sums in another order, where some fall
to another number of the format."""
ROUNDS = 7


def numbers(dry: bool) -> Numbers:
    """Of the emulation of each format, routed as bf16 is on the CPU; of none where torchao is not installed."""
    found = numbers_of(dry, torch.bfloat16, torch.device("cpu"), None)
    found = {"chosen": found["chosen"]}
    for name in FORMATS:
        with contextlib.suppress(DeviceError):
            made = numbers_of(dry, torch.bfloat16, torch.device("cpu"), found["chosen"], name)
            found |= {f"{name} {key}": value for key, value in made.items() if key != "chosen"}
    return found


def check(findings: Findings) -> None:
    """Each format near bf16 and equal to its emulation, the same bits again; what is not for this card is told."""
    where, sizes = current_device(), DRY if findings.dry else SMALL
    want = findings.expected("narrow")
    chosen = want.pop("chosen")
    plain = numbers_of(findings.dry, torch.bfloat16, where, chosen)
    del plain["chosen"]
    for name in FORMATS:
        try:
            check_format(name, sizes["hidden_size"], sizes["moe_ffn_hidden_size"], compute_capability())
        except DeviceError as error:
            findings.skip(name, error.what)
            continue
        with findings.case(name):
            got, again = (numbers_of(findings.dry, torch.bfloat16, where, chosen, name) for _ in range(2))
            emulated = {key: want[f"{name} {key}"] for key in plain}
            findings.compare(f"{name} against bf16", got, plain, FROM_BF16)
            findings.compare(f"{name} against its emulation", got, emulated, FROM_EMULATION)
            different = sum(not torch.equal(again[key], value) for key, value in got.items())
            findings.check(f"tensors that a second pass makes otherwise, {name}", different, 0)
            times = _times(findings.dry, name)
            findings.note(f"{name} takes {times} of the time of bf16, a full-scale layer, both ways")


def _times(dry: bool, name: str) -> str:
    """Of a layer forward and backward over that of bf16, interleaved: min / median / max."""
    sides = []
    for precision in (name, None):
        cfg = configuration(torch.bfloat16, **(DRY if dry else {}), experts_precision=precision or "null")
        layer = layer_of(cfg, current_device(), torch.bfloat16)
        shape = (128 if dry else 16_384, 1, cfg.model.hidden_size)
        x, grad = (torch.randn(shape, device=current_device(), dtype=torch.bfloat16) for _ in range(2))
        sides.append(Side(layer, x, grad))
    for side in sides:
        side.run()
    rounds = [[seconds(side.run, 1 if dry else 10) for side in sides] for _ in range(2 if dry else ROUNDS)]
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # which a pass sets, and schedules after it cannot
    return " / ".join(f"{ratio:.3f}" for ratio in spread([narrow / wide for narrow, wide in rounds]).values())
