"""From configuration to a model on its device, bare or wrapped for data-parallel training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP

from megatron_vpmoe.config.parameters import EMBEDDING, is_trained
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.experts import StackedExperts
from megatron_vpmoe.model.precision import cast_parameters
from megatron_vpmoe.model.transformer_config import VPTransformerConfig, transformer_config
from megatron_vpmoe.runtime.device import current_device, keep_memory
from megatron_vpmoe.runtime.sharded_data_parallel import ShardedDataParallel
from megatron_vpmoe.think.mixture_model import MixtureModel
from megatron_vpmoe.think.recall import Recall

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


def build_model(cfg: RunConfig, *, device: torch.device | None = None) -> VPModel:
    """The bare model of a run, initialised from the global seed; process groups must exist.

    With ``device=torch.device("meta")`` nothing is allocated: the shapes are real, the weights are not.
    """
    config = transformer_config(cfg)
    target = current_device() if device is None else device
    if target.type == "meta":
        config.perform_initialization = False
        with torch.device("meta"):
            return _assemble(config, cfg)
    model = _assemble(config, cfg).to(target)
    cast_parameters(model, config.params_dtype)
    if isinstance(model, MixtureModel):
        model.recall = Recall.of(cfg)
    return model


def _assemble(config: VPTransformerConfig, cfg: RunConfig) -> VPModel:
    kind = MixtureModel if config.layer_type == "mixture" else VPModel
    model = kind(
        config,
        cfg.model.padded_vocab_size,
        share_embeddings_and_output_weights=not cfg.model.untie_embeddings_and_output_weights,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    if config.gated_linear_unit:
        _declare_gate_and_up(model)
    return model


def _declare_gate_and_up(model: VPModel) -> None:
    """Megatron stacks a gated feed-forward's gate over its up projection: two matrices to the optimizer."""
    for module in model.modules():
        if isinstance(module, MLP | StackedExperts):
            weight: Any = module.fc1_weight if isinstance(module, StackedExperts) else module.linear_fc1.weight
            half = weight.shape[-2] // 2
            weight.matrix_rows = (slice(0, half), slice(half, 2 * half))


def freeze_parameters(model: VPModel, cfg: RunConfig) -> None:
    """Make what ``training.train_only`` does not name untrainable; a stage where no pattern matches is frozen whole.

    Of a tied embedding on two pipeline stages both copies go by the embedding's name.
    """
    if cfg.training.train_only is None:
        return
    for name, parameter in model.named_parameters():
        whole = EMBEDDING if getattr(parameter, "shared_embedding", False) else model.absolute_name(name)
        parameter.requires_grad_(is_trained(cfg, whole))


def _finalize_model_grads(model: list[torch.nn.Module], _num_tokens: object = None, **keywords: Any) -> None:
    """Upstream's, without a division by tokens, for whose number it asks the device: losses are divided already."""
    finalize_model_grads(model, None, **keywords)


def wrap_for_training(model: VPModel, cfg: RunConfig) -> ShardedDataParallel:
    """The model with fp32 gradients that are summed over ranks (the loss is normalised by global counts already).

    Parameters that ``train_only`` leaves out are frozen first: they have no gradient.
    """
    keep_memory()
    freeze_parameters(model, cfg)
    wrapped = ShardedDataParallel(model.config, model, overlap_grad_reduce=cfg.parallel.overlap_grad_reduce)
    wrapped.broadcast_params()
    model.config.finalize_model_grads_func = _finalize_model_grads
    model.config.no_sync_func = wrapped.no_sync
    return wrapped
