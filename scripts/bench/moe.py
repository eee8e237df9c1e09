"""One MoE layer, ours against Megatron-Core's MoELayer with SequentialMLP, interleaved in one run.

    python scripts/bench/moe.py                                  # 256 experts, top-4, hidden 256, FFN 128, 2048 tokens
    python scripts/bench/moe.py --experts 64 --dtype bf16

Both sides have the same weights, routing settings (sigmoid scores, groups, expert bias, sequence balance loss), biases;
outputs and gradients are compared first, and the benchmark ends with an error where they differ.
Upstream's shared expert refuses biases, so the layer has none. A round is forward plus backward of either side. Prints
one JSON object a dtype: milliseconds (fastest and median of the rounds), the ratio upstream / ours of each round (min,
median, max) by wall and by processor time, and the experts' implementation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.profiling.stopwatch import spread
from megatron_vpmoe.runtime import device, distributed

device.prepare()
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.mlp import MLPSubmodules  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules, RouterBuilder  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402

from megatron_vpmoe.model.layer_specs import layer_spec  # noqa: E402
from megatron_vpmoe.model.transformer_config import VPTransformerConfig, transformer_config  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ref.sequential_experts import stacked_from_sequential  # noqa: E402

NANO = Path(__file__).resolve().parents[2] / "configs" / "nano" / "stage1.yaml"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Largest difference of outputs and gradients, relative to the largest value of each tensor."""


def configuration(arguments: argparse.Namespace, dtype: torch.dtype) -> RunConfig:
    """The nano design with the layer's sizes; every routing setting is the design's own."""
    fields = {
        "hidden_size": arguments.hidden,
        "num_experts": arguments.experts,
        "moe_ffn_hidden_size": arguments.ffn,
        "moe_router_topk": arguments.topk,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
        "moe_shared_expert_intermediate_size": "null",
        "moe_token_dispatcher_type": arguments.dispatcher,
        "router_dead_experts_warn": "null",
        "bf16": str(dtype == torch.bfloat16).lower(),
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    return load_config(NANO, flags)


def upstream_layer(config: VPTransformerConfig) -> Any:
    """Megatron-Core's own parts for a machine without Transformer Engine.

    Its router's bias, which ours has not, is zero and frozen. Its experts' second linear takes the path of expert
    parallelism, which leaves out a reduction over one rank: behind that reduction adding the bias in place is an error
    of autograd (mlp.py:247).
    """
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    submodules = MoESubmodules(
        experts=ModuleSpec(module=SequentialMLP, submodules=linears), router=cast(RouterBuilder, TopKRouter)
    )
    layer: Any = MoELayer(config, submodules, layer_number=2, pg_collection=get_default_pg_collection())
    if layer.router.bias is not None:
        layer.router.bias.requires_grad_(False).zero_()
    for expert in layer.experts.local_experts:
        expert.linear_fc2.explicit_expert_comm = True
    return layer


def our_layer(config: VPTransformerConfig) -> Any:
    """The feed-forward of layer 2 as the model builds it."""
    spec = cast(Any, layer_spec(config, 2).submodules).mlp
    return spec.module(config, spec.submodules, layer_number=2, pg_collection=get_default_pg_collection())


def share_weights(ours: Any, theirs: Any) -> None:
    """Upstream's weights, as the configuration initialises them, copied into ours; biases are random to count at all,
    those of the router of the size of a few update steps."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.experts.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        theirs.router.expert_bias.copy_(torch.randn(theirs.router.expert_bias.shape, generator=generator) * 2e-3)
        ours.router.weight.copy_(theirs.router.weight)
        ours.router.expert_bias.copy_(theirs.router.expert_bias)
    state = {f"experts.{name}": value for name, value in theirs.experts.state_dict().items()}
    ours.experts.load_state_dict(stacked_from_sequential(state, "experts."))


class Side:
    """One layer and its input; ``run`` is a forward and a backward pass."""

    def __init__(self, layer: Any, x_SBH: torch.Tensor, grad_SBH: torch.Tensor) -> None:
        self.layer, self.grad = layer.to(x_SBH.device).train(), grad_SBH
        self.x = x_SBH.clone().requires_grad_()
        self.parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def run(self) -> torch.Tensor:
        """Gradients land in ``.grad``, fresh ones each time."""
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None
        out, _ = self.layer(self.x)
        out.backward(self.grad)
        return out

    def seconds(self) -> tuple[float, float]:
        """Wall and processor time of one ``run`` with the device idle before and after."""
        device.finish()
        wall, processor = time.perf_counter(), time.process_time()
        self.run()
        device.finish()
        return time.perf_counter() - wall, time.process_time() - processor


def differences(ours: Side, theirs: Side) -> dict[str, float]:
    """Largest difference over largest value, of the output and of each gradient."""
    pairs = {"output": (ours.run(), theirs.run()), "input gradient": (ours.x.grad, theirs.x.grad)}
    pairs["router gradient"] = (ours.layer.router.weight.grad, theirs.layer.router.weight.grad)
    gradients = {
        f"experts.{name}": torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in theirs.layer.experts.named_parameters()
    }
    for name, stacked in stacked_from_sequential(gradients, "experts.").items():
        pairs[f"{name} gradient"] = (getattr(ours.layer.experts, name).grad, stacked)
    return {name: float((a - b).detach().abs().max() / b.detach().abs().max()) for name, (a, b) in pairs.items()}


def measure(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, object]:
    """Compare, then time both sides."""
    config = transformer_config(configuration(arguments, dtype))
    where = device.current_device()
    theirs, ours = upstream_layer(config), our_layer(config)
    for layer in (theirs, ours):
        layer.to(where, dtype)
    share_weights(ours, theirs)
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.tokens, 1, arguments.hidden)
    x, grad = (torch.randn(shape, generator=generator).to(where, dtype) for _ in range(2))
    sides = Side(ours, x, grad), Side(theirs, x, grad)
    found = differences(*sides)
    wrong = {name: value for name, value in found.items() if not value <= TOLERANCE[dtype]}
    if wrong:
        raise SystemExit(f"the two layers differ (relative to the largest value): {wrong}")
    rounds = [tuple(side.seconds() for side in sides) for _ in range(arguments.rounds)]
    ratios = [b[0] / a[0] for a, b in rounds]
    processor = [b[1] / a[1] for a, b in rounds]
    milliseconds = [[1e3 * wall for wall, _ in column] for column in zip(*rounds, strict=True)]
    load = ours.router.tokens_per_expert / ours.router.tokens_per_expert.mean()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "largest_difference": max(found.values()),
        "busiest_expert_over_mean": round(float(load.max()), 2),
        "layout": ours.experts.last_layout,
        "load_average": round(os.getloadavg()[0], 1),
        "ours_ms": {"min": round(min(milliseconds[0]), 1), "median": round(statistics.median(milliseconds[0]), 1)},
        "upstream_ms": {"min": round(min(milliseconds[1]), 1), "median": round(statistics.median(milliseconds[1]), 1)},
        "upstream_over_ours": spread(ratios, 2),
        "upstream_over_ours_processor_time": spread(processor, 2),
    }


def main() -> None:
    """Parse the arguments and measure each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"experts": 256, "topk": 4, "hidden": 256, "ffn": 128, "tokens": 2048, "rounds": 15, "threads": 0}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "both"), default="both")
    parser.add_argument("--dispatcher", choices=("auto", "allgather", "alltoall"), default="auto")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = {"fp32": (torch.float32,), "bf16": (torch.bfloat16,), "both": (torch.float32, torch.bfloat16)}
    device.keep_memory()  # as in training; of either side
    with distributed.single_process(seed=0):
        for dtype in chosen[arguments.dtype]:
            MoEAuxLossAutoScaler.main_loss_backward_scale = None
            print(json.dumps(measure(arguments, dtype), indent=1))


if __name__ == "__main__":
    main()
