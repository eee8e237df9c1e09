"""Training steps of each design at nano size, on the card against the CPU; a run that is resumed there; the same bits.

The CPU's steps are in fp32, from weights that bf16 holds exactly; the card starts from these weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.optim import build_scheduler
from megatron_vpmoe.profiling.capture import Subject
from megatron_vpmoe.training import checkpoint
from scripts.gpu.frame import Findings, Numbers

DESIGNS = {"nano dense": "configs/nano/vpdense_8.yaml", "nano vpMoE": "configs/nano/stage1.yaml"}
STEPS = 2
LIMITS = {"fp32": (1e-4, 2e-2), "bf16": (1e-2, 0.15)}
"""Of losses over the steps, and of all gradients of the first one as one vector. Rounding grows through the layers: on
a CPU bf16 is 0.07 away from fp32."""


def numbers(dry: bool) -> Numbers:
    """Of each design: the weights it starts from, losses, gradients of the first step."""
    found = {}
    for design in DESIGNS:
        subject = Subject(_configuration(design, dry, bf16=False))
        with torch.no_grad():
            for parameter in subject.model.parameters():
                parameter.copy_(parameter.bfloat16())
        weights = {f"{design}/weight/{name}": p.detach().clone() for name, p in subject.model.named_parameters()}
        subject.optimizer.reload_model_params()
        found |= weights | {f"{design}/{name}": value for name, value in _steps(subject).items()}
    return found


def check(findings: Findings) -> None:
    """In fp32, which tells a fault from rounding, and in bf16 as full scale trains; on a card compiled as well."""
    expected = findings.expected("designs")
    for design in DESIGNS:
        of_design = {name.partition("/")[2]: x for name, x in expected.items() if name.startswith(f"{design}/")}
        weights = {name.removeprefix("weight/"): x for name, x in of_design.items() if name.startswith("weight/")}
        ways = [(precision, "off") for precision in LIMITS]
        if design == "nano vpMoE" and not findings.dry:  # on a CPU tests/unit has it
            ways.append(("bf16", "step"))
        for precision, choice in ways:
            of_loss, of_gradient = LIMITS[precision]
            case = f"{design}, {precision}" + (", compiled" if choice != "off" else "")
            with findings.case(case):
                subject = Subject(_configuration(design, findings.dry, bf16=precision == "bf16", choice=choice))
                with torch.no_grad():
                    for name, parameter in subject.model.named_parameters():
                        parameter.copy_(weights[name])
                subject.optimizer.reload_model_params()
                got = _steps(subject)
                findings.compare(f"{case}, losses", {"losses": got["losses"]}, {"losses": of_design["losses"]}, of_loss)
                findings.compare(f"{case}, gradients", _gradient(got), _gradient(of_design), of_gradient)
                before = {name: weights[name].to(x) for name, x in subject.model.named_parameters()}
                still = sum(torch.equal(before[name], x) for name, x in subject.model.named_parameters())
                findings.check(f"{case}, parameters that did not move", still, 0)


def _configuration(design: str, dry: bool, *, bf16: bool, choice: str = "off") -> RunConfig:
    fields = {
        "compile": choice,
        "nproc_per_node": 1,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "lr_warmup_iters": 0,
        "bf16": str(bf16).lower(),
        **({"seq_length": 96, "num_layers": 4} if dry else {}),
    }
    return load_config(DESIGNS[design], [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()])


def _steps(subject: Subject) -> Numbers:
    """Losses of the steps; gradients of the first, clipped to the norm that the optimizer is told."""
    losses, gradients = [], {}
    for number in range(STEPS):
        subject.step()
        losses.append(subject.loss)
        if number == 0:
            named = subject.model.named_parameters()
            gradients = {f"gradient/{name}": cast(Tensor, p.main_grad).clone() for name, p in named}  # type: ignore[attr-defined]
    return {"losses": torch.tensor(losses, dtype=torch.float64), **gradients}


def _gradient(found: Numbers) -> Numbers:
    """All gradients of the first step as one vector."""
    parts = [x.flatten().cpu().double() for name, x in sorted(found.items()) if name.startswith("gradient/")]
    return {"all": torch.cat(parts)}


def resume(findings: Findings) -> None:
    """Two steps, two more while a checkpoint is written; from it these two again, of a model that began elsewhere."""
    cfg = _configuration("nano vpMoE", findings.dry, bf16=True)
    with tempfile.TemporaryDirectory() as folder:
        first = Subject(cfg)
        scheduler = build_scheduler(first.optimizer, cfg)
        for _ in range(2):
            first.step()
        state = {"iteration": 2, "world_size": 1}
        saving = checkpoint.save(Path(folder), state, first.model, first.optimizer, scheduler, copy=True)
        done = first.done
        ends = [_two_steps(first)]
        saved = saving.wait()
        for _ in range(2):
            second = Subject(cfg)
            found = checkpoint.open_checkpoint(saved)
            checkpoint.load(found, second.model, second.optimizer, build_scheduler(second.optimizer, cfg))
            second.done = done
            ends.append(_two_steps(second))
    different = [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])]
    findings.check("tensors of weights and optimizer that differ after a resume", len(different), 0)
    if different:
        repeats = all(torch.equal(value, ends[2][name]) for name, value in ends[1].items())
        cause = "two resumes do: the resume is at fault" if repeats else "nor do two resumes: the steps do not repeat"
        findings.note(f"{different[0]} and others do not come out alike; {cause}")


def _two_steps(subject: Subject) -> Numbers:
    for _ in range(2):
        subject.step()
    found = {f"weight/{name}": x.detach().clone() for name, x in subject.model.state_dict().items() if x is not None}
    for number, member in enumerate(subject.optimizer.members):
        for of, group in enumerate(member.param_groups):
            for at, parameter in enumerate(group["params"]):
                found[f"master/{number}.{of}.{at}"] = parameter.detach().clone()
                for key, value in member.state[parameter].items():
                    found[f"{key}/{number}.{of}.{at}"] = value.detach().clone()
    return found
