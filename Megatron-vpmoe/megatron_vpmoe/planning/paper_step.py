"""One training step of a configuration on GPUs that are not there, counted: ``counted_step``.

Everything runs as in training, from the objective's counts to the gathered weights: the same model, schedule, gradient
reduction and optimizer, as one rank of a world of any size whose collectives do nothing. The batches are mock data.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vpmoe.planning import stand_ins
from megatron_vpmoe.planning.card import fake_mode, on_paper
from megatron_vpmoe.planning.counting import Counting
from megatron_vpmoe.planning.counts import Counts

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


@dataclass(frozen=True)
class Place:
    """One rank of a world, and the device that each rank has.

    Attributes:
        steps: equal ones, the last of which is counted; what is made once is counted where there is one.
    """

    world: int
    rank: int = 0
    steps: int = 2
    device: str = "NVIDIA H100 80GB HBM3"
    memory: int = 80 * 2**30


def counted_step(config: Path, overrides: Sequence[str], place: Place) -> Counts:
    """Count in a process of its own: this one may have prepared Megatron-Core for a machine without a GPU.

    Args:
        config: a configuration's file.
        overrides: of its fields, as on the command line.
        place: see there.

    Raises:
        RuntimeError: the process failed; its last lines say why.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "counts.json"
        command = [sys.executable, "-m", __name__, str(config), json.dumps(asdict(place)), str(out), *overrides]
        # What upstream compiles is counted as it would run without.
        environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{ran.stderr[-4000:]}")
        return Counts.from_json(out.read_text())


def _counted(cfg: RunConfig, place: Place) -> Counts:
    p = cfg.parallel
    split = p.tensor_model_parallel_size if p.sequence_parallel else 1
    tokens = cfg.training.micro_batch_size * cfg.data.seq_length // split
    rows = tokens * cfg.moe.moe_router_topk
    counting = Counting(fake_mode(), rows, lambda mask: rows if mask.numel() > tokens * split else mask.numel())
    new_group = dist.new_group
    dist.init_process_group("fake", store=FakeStore(), rank=place.rank, world_size=place.world)
    with (
        mock.patch.object(dist, "new_group", lambda *ranks, **own: new_group(*ranks, **own | {"backend": "fake"})),
        on_paper(place.device, place.memory, p.nproc_per_node, counting) as on_card,
    ):
        from megatron_vpmoe.runtime import distributed

        distributed.initialize(
            seed=cfg.training.seed,
            tensor_model_parallel_size=p.tensor_model_parallel_size,
            pipeline_model_parallel_size=p.pipeline_model_parallel_size,
            expert_model_parallel_size=p.expert_model_parallel_size,
        )
        _run(cfg, counting, on_card, place.steps)
    return counting.counts


def _run(cfg: RunConfig, counting: Counting, on_card: Callable[[Tensor], Tensor], steps: int) -> None:
    from megatron.core import parallel_state

    from megatron_vpmoe.model.attention.backends import flex
    from megatron_vpmoe.model.block import VPTransformerLayer
    from megatron_vpmoe.model.builder import build_model, wrap_for_training
    from megatron_vpmoe.model.precision import cast_parameters
    from megatron_vpmoe.model.recompute import is_recomputing
    from megatron_vpmoe.objectives import build_objective
    from megatron_vpmoe.optim import build_optimizer
    from megatron_vpmoe.profiling.mock import mock_step
    from megatron_vpmoe.runtime import stages
    from megatron_vpmoe.runtime.range_clock import UpstreamTimers
    from megatron_vpmoe.runtime.ranges import listening
    from megatron_vpmoe.training.step import train_step

    stand_ins.install_flex(flex, counting)
    # What other stages say is not there: each is taken to say what this one does, and the last one that all is well.
    stages.gather_stages = lambda value: [value] * cfg.parallel.pipeline_model_parallel_size  # type: ignore[assignment]
    stages.from_last_stage = lambda value: {"loss/total": 1.0} if value is None else value  # type: ignore[assignment]
    counting.ranges.is_again = is_recomputing
    model = build_model(cfg, device=torch.device("meta"))
    _put(model, on_card)
    cast_parameters(model, model.config.params_dtype)
    wrapped = wrap_for_training(model, cfg)
    optimizer = build_optimizer([wrapped], cfg)
    objective = build_objective(cfg)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = [batch.pinned() for batch in mock_step(cfg, step=0, dp_rank=rank, dp_size=size)]
    model.config.timers = UpstreamTimers(counting.ranges)
    for layer in model.decoder.layers:
        if isinstance(layer, VPTransformerLayer):  # those of others have no kinds
            _watch(layer, _kind(cfg, layer.layer_number), counting)
    with listening(counting.ranges):
        for _ in range(steps):
            counting.label(
                [grad for p in model.parameters() if (grad := getattr(p, "main_grad", None)) is not None], "gradients"
            )
            for member in optimizer.members:
                state = [value for of_one in member.optimizer.state.values() for value in of_one.values()]
                counting.label([*state, *(leaf.data for _, leaf in member._held)], "optimizer state")
            counting.label([*model.parameters(), *model.buffers()], "weights")
            counting.counts = Counts()
            train_step(wrapped, optimizer, objective, batches)


def _put(model: nn.Module, on_card: Callable[[Tensor], Tensor]) -> None:
    """Give every parameter memory on the card; what is known of it stays."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in moved:
                    moved[id(old)] = nn.Parameter(on_card(old.data), requires_grad=old.requires_grad)
                    vars(moved[id(old)]).update(vars(old))
                module._parameters[name] = moved[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = on_card(buffer)


def _kind(cfg: RunConfig, number: int) -> str:
    """Such as "global moe"."""
    reach = "global" if cfg.is_global_layer(number) else "local"
    return f"{reach} {'moe' if cfg.is_moe_layer(number) else 'dense'}"


def _watch(layer: nn.Module, kind: str, counting: Counting) -> None:
    """Note how many kernels the layer's forward pass launches."""
    began = [0]

    def before(*_: Any) -> None:
        began[0] = counting.launched

    def after(*_: Any) -> None:
        key = counting.ranges.of_pass, kind
        launched = counting.launched - began[0]
        counting.counts.layers[key] = min(counting.counts.layers.get(key, launched), launched)

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def main(arguments: list[str]) -> None:
    """CONFIG PLACE OUT [--key value ...]: what ``counted_step`` starts."""
    from megatron_vpmoe.config import load_config

    path, place, out, *overrides = arguments
    Path(out).write_text(_counted(load_config(Path(path), overrides), Place(**json.loads(place))).to_json())


if __name__ == "__main__":
    main(sys.argv[1:])
