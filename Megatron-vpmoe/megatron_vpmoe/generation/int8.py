"""Linear layers whose weights are int8, by torchao: for decoding and evaluation on a CPU.

Each output has a scale of its own, of its largest weight; products are made in the model's dtype. Kept as they are: the
embedding, with it the tied output projection, a mixture's adapters, and whatever is no matrix of a linear layer.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.nn import Linear, Module

from megatron_vpmoe.errors import ConfigError, DeviceError
from megatron_vpmoe.generation.state_decoder import StateDecoder, decoder_of
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.tensor_parallel import ReplicatedLinear

_LINEAR = Linear, ReplicatedLinear, ColumnParallelLinear, RowParallelLinear

_READ_AS_WEIGHTS = "latent_attention.linear_key", "latent_attention.linear_value"
"""Latent attention multiplies them into queries and outputs as matrices of heads."""

_NEAR_IDENTITY = "adapters."
"""What training adds to an identity is mostly below half a step of a scale that has to hold 1, and would be lost."""


class Narrowed(NamedTuple):
    """What became of a model: linear layers, and the bytes of all weights before and after."""

    layers: int
    before: int
    after: int


def narrow_to_int8(model: VPModel) -> Narrowed:
    """Replace the weights of a model's linear layers, in place and for good; it cannot be trained or saved then.

    Args:
        model: in evaluation mode, on a CPU; a mixture or a state space model.

    Raises:
        ConfigError: another model, or torchao is not installed.
        DeviceError: it is not on a CPU.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("int8 weights are torchao's, which is not installed", remedy="pip install 'vpmoe[narrow]'")
    if model.device.type != "cpu":
        source, remedy = f"a model on {model.device}", "leave --int8 out, or hide the GPU: CUDA_VISIBLE_DEVICES="
        raise DeviceError("int8 weights are for a CPU", source=source, remedy=remedy)
    if not isinstance(decoder_of(model, packed=False), StateDecoder):
        raise ConfigError(
            "a transformer's decoder reads its weights in layouts of oneDNN, which int8 has none of",
            source="model.layer_type: transformer",
            remedy="leave --int8 out; it is for mixtures and state space models",
        )
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    chosen: list[str] = []

    def is_narrowed(module: Module, name: str) -> bool:
        found = isinstance(module, _LINEAR) and not name.endswith(_READ_AS_WEIGHTS)
        found = found and not name.startswith(_NEAR_IDENTITY)
        chosen.extend([name] if found else [])
        return found

    before = _bytes(model)
    quantize_(model.decoder, Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=is_narrowed)
    return Narrowed(len(chosen), before, _bytes(model))


def _bytes(model: Module) -> int:
    total = 0
    for parameter in model.parameters():
        held: Any = parameter
        parts = [held.qdata, held.scale] if hasattr(held, "qdata") else [held]
        total += sum(part.nbytes for part in parts)
    return total
