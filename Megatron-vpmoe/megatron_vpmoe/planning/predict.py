"""How long a training step takes on a machine: an analytic model, from formulas of the work and a table of rates.

A piece of work takes as long as its products or its bytes, whichever is longer. The host launches ahead of the device:
of a pass, launches cost what they take beyond the work. Communication that nothing covers is added. See
docs/performance.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from megatron_vpmoe.config.buffers import held_buckets
from megatron_vpmoe.config.geometry import (
    output_training_flops,
    stage_layers,
    tensor_parallel_rank,
    training_flops_per_token,
)
from megatron_vpmoe.config.memory import FILL_FLOPS, STACK_BYTES
from megatron_vpmoe.config.orthogonal import orthogonal_matrices, polar_express_flops, slot_rows
from megatron_vpmoe.config.parameters import ROUTED, is_trained, parameter_sizes
from megatron_vpmoe.config.schema import RunConfig
from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.planning import work
from megatron_vpmoe.planning.wire import Ranks, all_gather, all_reduce, all_to_all, hand_over
from megatron_vpmoe.planning.work import Passes, Shape, Work
from megatron_vpmoe.runtime.machines import Fleet, Kind, Machine

SPLIT = ("compute", "memory", "launches", "communication", "waiting")
"""What a step's seconds are split into: products; bytes; launches that the work does not hide; the wire where nothing
covers it; a pipeline's stages that wait for each other."""
_RECOMPUTED = {
    "core_attn": ("attention",),
    "mlp": ("feed_forward",),
    "moe": ("router", "experts", "dispatch", "shared_expert"),
    "shared_experts": ("shared_expert",),
}


@dataclass(frozen=True)
class Prediction:
    """A step on a fleet.

    Attributes:
        split: seconds by ``SPLIT``; they add up to the step.
        parts: seconds of what the device does, by part of the model; "optimizer" among them.
        tokens: of a step, padding included.
        model_flops: of a step (``config/geometry.py``), each row taken for one document.
        gpus: devices.
        peak: FLOP/s of all devices in the run's precision.
    """

    split: dict[str, float]
    parts: dict[str, float]
    tokens: int
    model_flops: float
    gpus: int
    peak: float

    @property
    def step_seconds(self) -> float:
        """One step."""
        return sum(self.split.values())

    @property
    def mfu_pct(self) -> float:
        """Model FLOPs as a share of the peak."""
        return 100 * self.model_flops / self.step_seconds / self.peak

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.tokens / self.step_seconds


def _sum(*tables: Mapping[str, float], times: float = 1.0) -> dict[str, float]:
    """Key by key."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: times * sum(table.get(key, 0.0) for table in tables) for key in keys}


class _Clock:
    """Adds up the work of one pass on one machine."""

    def __init__(self, machine: Machine, *, bf16: bool, kept: float) -> None:
        self._rate, self._machine, self._kept = partial(machine.rate, bf16=bf16), machine, kept
        self._sums: dict[str, float] = defaultdict(float)
        self.parts: dict[str, float] = defaultdict(float)

    def run(self, pieces: Iterable[Work], times: int = 1) -> _Clock:
        """Add work that is done so many times."""
        sums, parts = self._sums, self.parts
        for piece in pieces:
            kind: Kind = "product" if piece.kind == "memory" else piece.kind
            products = piece.flops / self._rate(kind, piece.side) if piece.flops else 0.0
            moving = piece.moved / self._rate("memory", piece.tensor) if piece.moved else 0.0
            seconds = times * max(products, moving) / self._kept
            sums["compute" if products >= moving else "memory"] += seconds
            sums["launches"] += times * piece.launches
            parts[piece.part] += seconds
        return self

    def split(self) -> dict[str, float]:
        """Seconds of products, of bytes, and of launches that those do not hide."""
        compute, memory, launches = (self._sums[key] for key in ("compute", "memory", "launches"))
        machine = self._machine
        exposed = max(launches * machine.kernel_us, launches * machine.launch_us - 1e6 * (compute + memory)) * 1e-6
        return {"compute": compute, "memory": memory, "launches": exposed}


@dataclass(frozen=True)
class _Held:
    """Numbers of a rank's parameters: all; trained ones, routed experts apart."""

    all: float
    dense: float
    experts: float


def _held(cfg: RunConfig, layers: range) -> _Held:
    ep = cfg.parallel.expert_model_parallel_size
    counted: dict[str, float] = defaultdict(float)
    for name, size in parameter_sizes(cfg, layers).items():
        part = size / ep if ROUTED in name else size
        counted["all"] += part
        if is_trained(cfg, name):
            counted["experts" if ROUTED in name else "dense"] += part
    return _Held(counted["all"], counted["dense"], counted["experts"])


def _alike(shape: Shape, layers: range) -> list[tuple[Passes, list[int]]]:
    """The layers by kind: what one does, and which they are."""
    kinds: dict[object, list[int]] = {}
    for number in layers:
        cfg = shape.cfg
        kind = cfg.is_global_layer(number), cfg.is_moe_layer(number), cfg.is_tpa_layer(number), number == 1
        kinds.setdefault(kind, []).append(number)
    return [(work.layer_passes(shape, numbers[0]), numbers) for numbers in kinds.values()]


def _again(cfg: RunConfig, of_one: Passes, numbers: list[int], layers: range) -> tuple[list[Work], int]:
    """What the backward pass runs again of layers of one kind, and of how many of them."""
    t = cfg.training
    if t.recompute_granularity is None:
        return [], 0
    if t.recompute_granularity == "full":
        below = layers.start + (t.recompute_num_layers or 1) if t.recompute_method == "block" else layers.stop
        return of_one.forward, sum(number < below for number in numbers)
    modules = t.recompute_modules or ["core_attn"]
    parts = {part for module in modules for part in _RECOMPUTED[module]}
    pieces = [piece for piece in of_one.forward if piece.part in parts]
    # Of attention the scores alone.
    return [piece for piece in pieces if piece.part != "attention" or piece.kind == "attention"], len(numbers)


def _optimizer(cfg: RunConfig, layers: range, held: _Held, sharing: int, replicas: int, on_cpu: bool) -> list[Work]:
    """Gradient norm, NorMuon and AdamW, of one rank's share.

    Args:
        cfg: the run, whole.
        layers: of the stage.
        held: of this rank.
        sharing: ranks of a stage; each takes as many matrices as any other.
        replicas: data-parallel ranks.
        on_cpu: see ``Shape``.
    """
    bf16, narrow = cfg.training.bf16, cfg.optim.polar_express_dtype
    in_bf16 = narrow == "bfloat16" or (narrow == "auto" and not on_cpu)
    stack_mib, experts = cfg.optim.normuon_stack_mib, cfg.moe.num_experts or 1
    device = "cpu" if on_cpu else "cuda"
    stack_bytes, fill = STACK_BYTES[device] if stack_mib is None else stack_mib * 2**20, FILL_FLOPS[device]
    pieces, numbers = [], 0.0
    for shapes, of_param in zip(orthogonal_matrices(cfg, layers), (math.inf, experts), strict=True):
        shares = {shape: count / sharing for shape, count in shapes.items()}
        numbers += sum(share * rows * cols for (rows, cols), share in shares.items())
        stacked: dict[tuple[int, int], float] = defaultdict(float)
        for (rows, cols), slot in slot_rows(shares, fill).items():
            stacked[slot, cols] += shares[rows, cols]
        for (rows, cols), share in stacked.items():
            forms = ("direct",) if in_bf16 else ("direct", "gram")
            flops = min(polar_express_flops(rows, cols, cfg.optim.polar_express_steps, form) for form in forms)
            stacks = max(1, math.ceil(share * rows * cols * 4 / stack_bytes))
            moved, kind = share * rows * cols * 128, "small" if in_bf16 or on_cpu else "wide"
            stack = share * rows * cols * 4 / stacks
            launches = 27 * stacks + 5 * share / of_param  # experts are worked on parameter by parameter
            pieces.append(Work("optimizer", kind, share * flops, 0.0, 25 * stacks, min(rows, cols), 0.0))
            pieces.append(Work("optimizer", "memory", 0.0, moved, launches, 1, stack))
    of_experts = held.experts * cfg.parallel.expert_model_parallel_size / sharing
    others = max(0.0, held.dense / replicas + of_experts - numbers)
    pieces.append(Work("optimizer", "memory", 0.0, others * (50 if bf16 else 40), 120, 1, 2.0**26))
    zeroed = 4 * (held.dense + held.experts)  # before the step
    return [*pieces, Work("other", "memory", 0.0, zeroed, 36, 1, 2.0**26)]


def predict(cfg: RunConfig, fleet: Fleet, *, supervised: float = 1.0) -> Prediction:
    """The step of a configuration without problems on a fleet of its size.

    Sampling, a second model and validation are not in it; rows are taken for whole documents.

    Args:
        cfg: the run.
        fleet: as many devices as it has processes.
        supervised: share of the positions whose loss is asked.

    Raises:
        DeviceError: its layers are no transformer's.
    """
    if cfg.model.layer_type != "transformer":
        what = f"what {cfg.model.layer_type} layers take is not predicted"
        raise DeviceError(what, source="model.layer_type", remedy="train some steps: the log says their speed")
    machine, p, t = fleet.machine, cfg.parallel, cfg.training
    tp, pp, ep = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.expert_model_parallel_size
    of_stage = fleet.gpus // pp
    replicas, tokens = of_stage // tp, t.micro_batch_size * cfg.data.seq_length
    micro_batches = max(1, t.global_batch_size // (t.micro_batch_size * replicas))
    size = 2 if t.bf16 else 4
    own = tokens // (tp if p.sequence_parallel else 1)
    shape = Shape(tensor_parallel_rank(cfg), tokens, own, size, machine.is_cpu, supervised)
    node = min(fleet.per_node, of_stage)
    tensor_ranks, expert_ranks = Ranks(tp, min(tp, node)), Ranks(ep, min(ep, node))
    data_ranks = Ranks(replicas, max(1, min(replicas, node // tp)))
    expert_data_ranks = Ranks(of_stage // ep, max(1, min(of_stage // ep, node // ep)))
    clock = partial(_Clock, machine, bf16=t.bf16, kept=machine.beside if fleet.gpus > 1 else 1.0)

    slowest: tuple[float, dict[str, float], dict[str, float]] | None = None
    for layers in stage_layers(cfg):
        is_last = layers.stop == cfg.model.num_layers + 1
        held = _held(shape.cfg, layers)
        passes = work.around_layers(shape, layers)
        passes += work.accumulation(shape, layers, held.dense + held.experts)
        if is_last:
            passes += work.loss_passes(shape)
        forward, again, backward = clock().run(passes.forward), clock(), clock().run(passes.backward)
        for of_one, numbers in _alike(shape, layers):
            forward.run(of_one.forward, len(numbers))
            backward.run(of_one.backward, len(numbers))
            again.run(*_again(cfg, of_one, numbers, layers))
        sent = _sent(shape, layers, fleet, tensor_ranks, expert_ranks, again=t.recompute_granularity == "full")
        micro = _sum(forward.split(), again.split(), backward.split(), {"communication": sent})
        parts = _sum(forward.parts, again.parts, backward.parts, times=micro_batches)
        update = clock().run(_optimizer(cfg, layers, held, of_stage, replicas, machine.is_cpu))
        reduced, gathered = _shared(shape.cfg, layers, fleet, data_ranks, expert_data_ranks)
        # One bucket at least is complete only when the pass, or the update, is.
        if p.overlap_grad_reduce and reduced:
            reduced = [max(*reduced, sum(reduced) - sum(_sum(again.split(), backward.split()).values()))]
        if gathered:
            gathered = [max(*gathered, sum(gathered) - sum(update.split().values()))]
        once = _sum(update.split(), {"communication": sum(reduced) + sum(gathered)})
        step = _sum(_sum(micro, times=micro_batches), once)
        step["waiting"] = (pp - 1) * sum(micro.values())
        total = sum(step.values())
        if slowest is None or total > slowest[0]:
            slowest = total, step, _sum(parts, update.parts)
    assert slowest is not None
    _, step, of_parts = slowest
    step_tokens = t.global_batch_size * cfg.data.seq_length
    return Prediction(
        split={key: step[key] for key in SPLIT},
        parts=of_parts,
        tokens=step_tokens,
        model_flops=step_tokens * (training_flops_per_token(cfg) - (1 - supervised) * output_training_flops(cfg)),
        gpus=fleet.gpus,
        peak=fleet.gpus * machine.peak(bf16=t.bf16),
    )


def _shared(
    cfg: RunConfig, layers: range, fleet: Fleet, data_ranks: Ranks, expert_data_ranks: Ranks
) -> tuple[list[float], list[float]]:
    """Seconds that each bucket of fp32 gradients takes to be summed, and each of weights to be gathered."""
    machine, reduced, gathered = fleet.machine, [], []
    for held in held_buckets(cfg, layers, world=fleet.gpus, on_cpu=machine.is_cpu):
        ranks = expert_data_ranks if held.kind == "experts" else data_ranks
        travel = all_gather if held.bucket.even else all_reduce
        reduced.append(travel(machine, 4 * held.bucket.size, ranks))
        gathered.append(travel(machine, held.weight_bytes * held.bucket.size, ranks))
    return reduced, gathered


def _sent(shape: Shape, layers: range, fleet: Fleet, tensor_ranks: Ranks, expert_ranks: Ranks, *, again: bool) -> float:
    """Seconds on the wire of one micro-batch: what no work of it covers."""
    cfg, machine, m, passes = shape.cfg, fleet.machine, shape.cfg.model, 3 if again else 2
    hidden = float(shape.tokens * m.hidden_size * shape.size)
    # Gathered and scattered twice a layer, and TPA's shared factors; backward the gathered inputs once more.
    seconds = len(layers) * (2.5 * passes + 1) * all_gather(machine, hidden, tensor_ranks)
    if expert_ranks.count > 1:
        sparse = sum(cfg.is_moe_layer(number) for number in layers)
        rows = shape.own * cfg.moe.moe_router_topk * m.hidden_size * shape.size
        seconds += sparse * 2 * passes * all_to_all(machine, float(rows), expert_ranks)
    if cfg.parallel.pipeline_model_parallel_size > 1:
        wire = hidden + shape.tokens * m.value_residual * m.num_query_groups * m.kv_channels * shape.size
        of_stage = fleet.gpus // cfg.parallel.pipeline_model_parallel_size
        seconds += 2 * hand_over(machine, wire, same_node=of_stage < fleet.per_node)
    return seconds
