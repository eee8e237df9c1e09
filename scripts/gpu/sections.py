"""The sections in their order. Their budgets, with the start and the CPU's numbers, make less than eight minutes."""

from __future__ import annotations

from scripts.gpu import attention, designs, experts, loss, narrow, optimizer, step
from scripts.gpu.frame import Section

SECTIONS = [
    Section(
        "attention",
        "every attention backend against dense attention in fp64 on the CPU",
        65,
        attention.check,
        attention.numbers,
        decides=True,
    ),
    Section(
        "experts", "the MoE layer against itself in fp64 on the CPU", 20, experts.check, experts.numbers, decides=True
    ),
    Section(
        "narrow",
        "experts in narrow formats against bf16, and against their emulation on the CPU",
        40,
        narrow.check,
        narrow.numbers,
        decides=True,
    ),
    Section("loss", "losses over chunks of logits against fp64 on the CPU", 20, loss.check, loss.numbers, decides=True),
    Section(
        "optimizer", "NorMuon and AdamW against fp64 on the CPU", 20, optimizer.check, optimizer.numbers, decides=True
    ),
    Section(
        "designs",
        "training steps of nano dense and nano vpMoE, in fp32 and bf16, one compiled, against fp32 on the CPU",
        60,
        designs.check,
        designs.numbers,
        decides=True,
    ),
    Section("resume", "a resumed run against one that went on, bit for bit", 30, designs.resume, decides=True),
    Section("attention-speed", "flex against unfused attention, and flash without a sink", 90, attention.speed),
    Section("experts-speed", "a full-scale MoE layer against its roofline", 20, experts.speed),
    Section("optimizer-speed", "NorMuon on as many full-size layers as fit, against its floor", 25, optimizer.speed),
    Section("step", "a step of eight full-width layers: MFU, profile, memory against the estimate", 60, step.speed),
]
