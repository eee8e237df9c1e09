"""Decoding steps through torch's compiler: the layers of a mixture's experts and of a state space model.

Compiled are a state space layer, a transformer layer and a layer of the denoiser, each whole, once for one row and once
for several, with any number of columns and for all layers of a kind. A step waits for that when its kind first comes;
torch keeps what it makes on the disk, and a later process waits less. What is around the layers stays as it is: latent
attention, router, noise, adapters, the output projection; so do passes over whole texts, a prompt's among them.
"""

from __future__ import annotations

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime.device import check_compiler
from megatron_vpmoe.think.diffuser import Diffuser
from megatron_vpmoe.think.mixture_model import MixtureModel
from megatron_vpmoe.think.stack_expert import StackExpert
from megatron_vpmoe.think.state_space import StateSpaceLayer


def compile_step(model: VPModel) -> None:
    """Have a model's decoding steps compiled from now on.

    Args:
        model: in evaluation mode; a mixture or a state space model, also with int8 weights.

    Raises:
        ConfigError: another model.
        DeviceError: it is on a CPU, and there is no C++ compiler.
    """
    layer_type = getattr(model.config, "layer_type", None)
    if not isinstance(model, MixtureModel) and layer_type != "state_space":
        raise ConfigError(
            "no way is built to compile its decoding steps",
            source=f"model.layer_type: {layer_type}",
            remedy="leave --compile out; it is for mixtures and state space models",
        )
    if model.device.type == "cpu":
        check_compiler("--compile", "leave --compile out")
    for module in model.modules():
        if isinstance(module, Diffuser | StackExpert | StateSpaceLayer):
            module.compiled_step = True
