"""The first thirty steps of two nano runs, as nano_losses.json has them, and runs with one constant changed.

Another CPU sums in another order. Losses then differ in their last digits, and with experts only until a token finds
two of them so equal that it goes to the other one: from there on a run is as far from the stored one as that token
takes it. So there are two tolerances for each number, one while every expert has as many tokens as it had, and one from
then on. A run without experts is always held to the first, which sees what moves a loss by a millionth.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, nan
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tests import training_runs
from tests.mini_dataset import PADDED_VOCAB, SEQ_LENGTH
from tests.workers import Started

STORED = Path(__file__).with_suffix(".json")
STEPS = 30
FIELDS: dict[str, object] = {
    "padded_vocab_size": PADDED_VOCAB,
    "seq_length": SEQ_LENGTH,
    "lr_warmup_iters": 4,
    "lr_decay_iters": STEPS,
    "save_interval": None,
    "eval_interval": None,
    "sample_interval": None,
}
RUNS: dict[str, dict[str, object]] = {"vpmoe": {}, "vpdense": {"num_experts": None}}
"""What is stored: the nano design, and the same without experts."""
Readings = dict[str, list[float]]
"""Tag -> value of each step."""
ROUTING = "moe/router_agg/mean_cv_pct"
"""The same to the last digits as long as no expert has another number of tokens."""


class Tolerance(NamedTuple):
    """Relative: while tokens go to the same experts, and after one has gone to another."""

    routed_alike: float
    otherwise: float


# Measured over AVX-512, AVX2 and SSE, one and two threads, and rows one by one (docs/LOG.md, "golden losses"): the
# largest differences are a tenth or less of each.
TOLERANCES = {
    "lr": Tolerance(1e-8, 1e-8),
    "tokens/": Tolerance(0, 0),
    "weight/": Tolerance(1e-8, 1e-8),
    "loss/": Tolerance(2e-6, 2e-3),
    "grad_norm/": Tolerance(1e-3, 0.4),
    "grad_norm": Tolerance(1e-5, 4e-3),
    "param_norm/": Tolerance(3e-5, 1e-3),
    "update_rms/": Tolerance(1e-3, 0.1),
    "moe/seq_aux_loss": Tolerance(1e-4, 2e-2),
    "moe/router_agg/expert_bias_range": Tolerance(1e-4, 0.4),
    ROUTING: Tolerance(2e-2, 2e-2),
}
"""By the beginning of a tag, the first that fits; other tags are not stored."""


@dataclass(frozen=True)
class Mutation:
    """One constant changed: a field of the configuration, or ``place`` (module:name) by a function of what is there."""

    fields: Mapping[str, object] = field(default_factory=dict)
    place: str | None = None
    change: Callable[[Any], Any] = lambda value: value
    of: str = "vpdense"
    steps: int = 6


def _scaled(factor: float) -> Callable[[Any], Any]:
    """Of a function: the same with its result times ``factor``."""
    return lambda function: lambda *given, **named: factor * function(*given, **named)


MUTATIONS: dict[str, Mutation] = {
    "model: rotary base 1e6 to 9e5": Mutation({"rotary_base": 900_000}),
    "model: GRAPE-M's scale of log frequencies 16 to 15": Mutation({"grapem_log_freq_scale": 15.0}),
    "model: slopes of the distance bias, 2 % steeper": Mutation(
        place="megatron_vpmoe.model.attention.grape:alibi_slopes", change=_scaled(1.02)
    ),
    "model: window 8 to 9": Mutation({"window_size": 9}),
    "model: epsilon of the norms 1e-6 to 1e-5": Mutation({"layernorm_epsilon": 1e-5}),
    "model: initial deviation 0.02 to 0.0201": Mutation({"init_method_std": 0.0201}),
    "model: scaling factor of the experts 2.5 to 2.49": Mutation({"moe_router_topk_scaling_factor": 2.49}, of="vpmoe"),
    "model: every second layer global, not every fourth": Mutation({"window_attn_skip_freq": 2}),
    "router: bias rate 1e-3 to 1.1e-3": Mutation({"moe_router_bias_update_rate": 1.1e-3}, of="vpmoe"),
    "router: balance loss 1e-4 to 1.2e-4": Mutation({"moe_aux_loss_coeff": 1.2e-4}, of="vpmoe"),
    "optimizer: NorMuon's momentum 0.95 to 0.94": Mutation({"normuon_momentum": 0.94}),
    "optimizer: NorMuon's beta2 0.95 to 0.9": Mutation({"normuon_beta2": 0.9}, steps=STEPS),
    "optimizer: first coefficient of Polar Express, 0.1 % more": Mutation(
        place="megatron_vpmoe.optim.polar_express:COEFFICIENTS",
        change=lambda table: ((table[0][0] * 1.001, *table[0][1:]), *table[1:]),
    ),
    "optimizer: headroom of Polar Express 2e-2 to 2.2e-2": Mutation({"polar_express_safety": 2.2e-2}),
    "optimizer: size of NorMuon's updates, 0.5 % more": Mutation(
        place="megatron_vpmoe.optim.normuon:row_factors", change=_scaled(1.005)
    ),
    "optimizer: AdamW's beta1 0.9 to 0.89": Mutation({"adam_beta1": 0.89}),
    "optimizer: AdamW's beta2 0.95 to 0.94": Mutation({"adam_beta2": 0.94}),
    "optimizer: weight decay 0.01 to 0.02": Mutation({"weight_decay": 0.02}, steps=12),
    "optimizer: clipping at 1 to 1.02": Mutation({"clip_grad": 1.02}),
    "schedule: warm-up of 4 steps to 5": Mutation({"lr_warmup_iters": 5}),
    "schedule: cosine to linear": Mutation({"lr_decay_style": "linear"}),
    "schedule: floor 5e-4 to 4e-4": Mutation({"min_lr": 4e-4}),
    "schedule: the routers' peak 3e-4 to 3.1e-4": Mutation({"router_lr": 3.1e-4}, of="vpmoe"),
    "objective: weight of the answer 0.2 to 0.201": Mutation({"kd_span_weight_final": 0.201}),
    "data: order by another seed": Mutation({"data_seed": 1235}),
    "data: packing among 8 conversations, not 4,096": Mutation({"packing_window": 8}),
    "data: rows of a packing window in reverse": Mutation(
        place="megatron_vpmoe.data.cursor:pack",
        change=lambda pack: lambda *given, **named: pack(*given, **named)[::-1],
    ),
}
"""What each of the published constants does to a run is seen; ``steps``: within so many."""


class Deviation(NamedTuple):
    """A number that is not the stored one; ``times``: its relative difference over the tolerance."""

    step: int
    tag: str
    found: float
    stored: float
    times: float

    def __str__(self) -> str:
        return f"step {self.step}: {self.tag} is {self.found:.8g}, was {self.stored:.8g} ({self.times:.3g} x tolerance)"


def started(
    of: str, folder: Path, dataset: Path, steps: int = STEPS, mutation: str | None = None, **more: object
) -> Started:
    """One of RUNS in a process of its own, as far as ``steps``; its files lie in ``folder``."""
    changed = MUTATIONS[mutation].fields if mutation else {}
    fields = {**FIELDS, **RUNS[of], "train_iters": steps, **changed, **more}
    arguments = training_runs.command(folder, dataset, **fields)[3:]
    return Started(_run, mutation, arguments, environment={})


def _run(mutation: str | None, arguments: list[str]) -> NoReturn:
    """What the process does."""
    place = MUTATIONS[mutation].place if mutation else None
    if mutation and place:
        module, _, name = place.partition(":")
        owner = importlib.import_module(module)
        setattr(owner, name, MUTATIONS[mutation].change(getattr(owner, name)))
    training_runs._run(arguments)


def readings(folder: Path) -> Readings:
    """What is stored of a run that has ended."""
    found: Readings = {}
    for (_, tag), value in sorted(training_runs.measured(folder).items()):
        if tolerance_of(tag) is not None:
            found.setdefault(tag, []).append(value)
    return found


def finished(run: Started, folder: Path) -> Readings:
    """The readings of ``started``, once it has ended well."""
    done = run.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    return readings(folder)


def tolerance_of(tag: str) -> Tolerance | None:
    """None: the tag is not compared."""
    for begin, tolerance in TOLERANCES.items():
        if tag == begin or tag.startswith(begin if begin.endswith("/") else f"{begin}/"):
            return tolerance
    return None


def deviations(found: Readings, stored: Readings) -> list[Deviation]:
    """All numbers out of tolerance over the steps that ``found`` has, by step; so is a tag that one side lacks."""
    either = sorted(found.keys() ^ stored.keys())
    lacking = [Deviation(1, tag, found.get(tag, [nan])[0], stored.get(tag, [nan])[0], inf) for tag in either]
    steps = len(found["loss/total"]) if stored else 0
    alike, different = True, []
    for step in range(steps):
        loads = [side[ROUTING][step] for side in (found, stored) if ROUTING in side] or [0.0]
        alike = alike and abs(loads[0] - loads[-1]) <= 2e-9 * loads[-1]
        for tag in found.keys() & stored.keys():
            ours, theirs, tolerance = found[tag][step], stored[tag][step], tolerance_of(tag)
            assert tolerance is not None
            allowed = tolerance.routed_alike if alike else tolerance.otherwise
            apart = abs(ours - theirs) / max(abs(theirs), 1e-30)
            if not apart <= allowed:
                different.append(Deviation(step + 1, tag, ours, theirs, apart / allowed if allowed else inf))
    return [*lacking, *sorted(different, key=lambda each: (each.step, -each.times))]


def load() -> dict[str, Readings]:
    """The stored readings of each run."""
    return json.loads(STORED.read_text())


def store(found: Mapping[str, Readings]) -> None:
    """In place of them, a tag a line, to nine digits."""
    runs = []
    for of, tags in found.items():
        lines = (f'  "{tag}": {json.dumps([float(f"{x:.9g}") for x in tags[tag]])}' for tag in sorted(tags))
        runs.append(f' "{of}": {{\n' + ",\n".join(lines) + "\n }")
    STORED.write_text("{\n" + ",\n".join(runs) + "\n}\n")


def mutated(names: Iterable[str], dataset: Path, beside: int = 2) -> Iterator[tuple[str, list[Deviation]]]:
    """Each mutation with the deviations of its run, ``beside`` of which go on at a time; none: it was not seen."""
    stored, running = load(), deque[tuple[str, Path, Started]]()
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate([*names, *[None] * beside]):
            if len(running) == beside or name is None:
                if not running:
                    return
                earlier, run_dir, run = running.popleft()
                yield earlier, deviations(finished(run, run_dir), stored[MUTATIONS[earlier].of])
            if name is not None:
                run_dir = Path(folder) / str(number)
                of, steps = MUTATIONS[name].of, MUTATIONS[name].steps
                running.append((name, run_dir, started(of, run_dir, dataset, steps, name)))
