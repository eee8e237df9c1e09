"""What a model does with a text: which experts its tokens go to, and what a layer's heads attend to.

One forward pass of the model itself; hooks take what goes into a layer, and the layer's own functions say what it makes
of that. A test holds both to what the pass computes.

Shapes: T tokens, E experts, K experts a token, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.errors import visible
from vpmoe.errors import DataError
from vpmoe.eval.asking import AsText, Form
from vpmoe.tokenizer.interface import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from megatron_vpmoe.generation.prompts import Completion
    from megatron_vpmoe.model.gpt import VPModel

LONGEST = 2048
"""Tokens of an inspected text: attention weights of a layer are H · T² numbers."""


@dataclass(frozen=True)
class LayerRouting:
    """Of one layer, or of a mixture.

    Attributes:
        experts: E.
        chosen: int64 [T, K], the heaviest first.
        weight: fp32 [T, K], of the chosen experts' outputs.
        entropy: fp32 [T], of the router's scores as shares, in units of ln E: 1 is no preference.
        names: of a mixture's experts, all of which are chosen; none where they have numbers alone.
    """

    experts: int
    chosen: NDArray[np.int64]
    weight: NDArray[np.float32]
    entropy: NDArray[np.float32]
    names: tuple[str, ...] = ()

    @property
    def load(self) -> NDArray[np.float64]:
        """[E]: tokens that each expert got; of a mixture each counts by its weight."""
        counted = self.weight.flatten() if self.names else None
        return np.bincount(self.chosen.flatten(), counted, minlength=self.experts).astype(np.float64)

    def name(self, expert: int) -> str:
        """What an expert is called."""
        return self.names[expert] if self.names else f"expert {expert}"


@dataclass(frozen=True)
class LayerAttention:
    """Of one layer.

    Attributes:
        window: keys that a query sees, itself included; None: all before it.
        position: how positions enter, such as ``rope``.
        weight: fp32 [H, T, T], of a query (second axis) what it takes of each key.
        has_sink: heads may leave a part of their attention to a sink.
    """

    window: int | None
    position: str
    weight: NDArray[np.float32]
    has_sink: bool

    @property
    def sink(self) -> NDArray[np.float32]:
        """fp32 [H, T]: what a query leaves to the sink."""
        return (1.0 - self.weight.sum(-1)).clip(0.0, 1.0)


def routing_of(model: VPModel, ids: list[int]) -> dict[int, LayerRouting]:
    """The routing of a text in each layer with experts, by the layer's number from 1; of a mixture under 1.

    Raises:
        DataError: no tokens, or too many.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_vpmoe.model.moe.router import VPMoERouter, weights_at

    if names := mixed_experts(model):
        return {1: _mixed(model, ids, names)}

    found: dict[int, LayerRouting] = {}

    def look(layer: Module, given: tuple[Any, ...]) -> None:
        router = cast(VPMoERouter, layer.router)
        score_TE = router.scores(given[0]).flatten(0, -2)
        chosen_TK = router.best(score_TE)
        scaling = router.config.moe_router_topk_scaling_factor
        weight_TK = weights_at(score_TE, chosen_TK, router.score_function, scaling).float()
        share_TE = score_TE.softmax(-1) if router.score_function == "softmax" else score_TE / score_TE.sum(-1, True)
        entropy_T = -(share_TE * share_TE.clamp_min(1e-30).log()).sum(-1) / math.log(max(score_TE.shape[-1], 2))
        order = weight_TK.argsort(dim=-1, descending=True, stable=True)
        chosen_TK, weight_TK = chosen_TK.gather(1, order), weight_TK.gather(1, order)
        found[cast(int, layer.layer_number)] = LayerRouting(
            score_TE.shape[-1], chosen_TK.cpu().numpy(), weight_TK.cpu().numpy(), entropy_T.float().cpu().numpy()
        )

    _pass(model, ids, [(module, look) for module in model.modules() if isinstance(module, MoELayer)])
    return dict(sorted(found.items()))


def mixed_experts(model: VPModel) -> tuple[str, ...]:
    """The experts of a mixture in the order of its weights; none of other models."""
    from megatron_vpmoe.think.mixture_model import MixtureModel

    return tuple(model.decoder.experts.keys()) if isinstance(model, MixtureModel) else ()


def weights_of(completion: Completion) -> NDArray[np.float32]:
    """fp32 [n, E], of n new tokens: the weights of a mixture's experts, as recorded, by which each was written."""
    return np.concatenate(completion.routing)[-len(completion.ids) :]


def _mixed(model: VPModel, ids: list[int], names: tuple[str, ...]) -> LayerRouting:
    from megatron_vpmoe.model.moe.replay import recording
    from megatron_vpmoe.think.router import entropy

    with recording(model) as told:
        _pass(model, ids, [])
        weight_TE = cast("Callable[[], Tensor]", told)()
    sorted_TE, order_TE = weight_TE.sort(dim=-1, descending=True, stable=True)
    undecided_T = entropy(weight_TE) / math.log(len(names))
    found = (x.cpu().numpy() for x in (order_TE, sorted_TE.float(), undecided_T.float()))
    return LayerRouting(len(names), *found, names=names)


def attention_of(model: VPModel, ids: list[int], number: int) -> LayerAttention:
    """What the heads of layer ``number`` (from 1) attend to.

    Raises:
        DataError: no tokens, too many, or no such layer.
    """
    from megatron_vpmoe.model.attention.backends.reference import attention_weights
    from megatron_vpmoe.model.block import VPTransformerLayer

    found: list[LayerAttention] = []
    layers = [layer for layer in model.modules() if isinstance(layer, VPTransformerLayer)]
    if number not in range(1, len(layers) + 1):
        raise DataError(f"there is no layer {number}", source="the model", remedy=f"1 to {len(layers)}")

    def look(layer: Module, given: tuple[Any, ...]) -> None:
        block = cast(VPTransformerLayer, layer)
        attention = block.self_attention
        hidden, layout, first_value = given[:3]
        query, key, _, _ = block.before_attention(hidden, attention.turns(layout), first_value)
        slopes, scale = attention.slopes(query.device), attention.softmax_scale
        weight = attention_weights(query, key, layout, attention.window, slopes, attention.sink, scale)
        held = weight[0].float().cpu().numpy()
        found.append(LayerAttention(attention.window, attention.position_embedding, held, attention.sink is not None))

    _pass(model, ids, [(layers[number - 1], look)])
    return found[0]


def _pass(
    model: VPModel, ids: list[int], looks: list[tuple[Module, Callable[[Module, tuple[Any, ...]], None]]]
) -> None:
    """Run the model on a text, and each look on what goes into its module."""
    import torch

    from megatron_vpmoe.model.attention.masks import left_padded
    from megatron_vpmoe.model.tensor_parallel import whole_sequences

    if not 1 <= len(ids) <= LONGEST:
        raise DataError(
            f"a text of {len(ids):,} tokens", source="the text to look into", remedy=f"1 to {LONGEST:,} tokens"
        )
    if outside := [one for one in ids if not 0 <= one < model.vocab_size]:
        raise DataError(f"token {outside[0]} is none of the model's", source="the text", remedy="use its vocabulary")
    was_training = model.training
    model.eval()
    with ExitStack() as held, torch.no_grad(), whole_sequences(model):
        for module, look in looks:
            held.callback(module.register_forward_pre_hook(look).remove)
        held.callback(model.train, was_training)
        tokens, layout = left_padded([ids], model.device)
        model(tokens, layout)


def given_ids(form: Form, text: str) -> list[int]:
    """Token ids of a text to look into: as the user's message of a conversation, or alone."""
    return form.tokenizer.encode_ordinary(text).tolist() if isinstance(form, AsText) else form.prompt(text)


def layer_numbers(model: VPModel) -> list[int]:
    """Of all layers with attention to look at, from 1; of a mixture those of its transformer."""
    from megatron_vpmoe.model.block import VPTransformerLayer

    return [*range(1, sum(isinstance(layer, VPTransformerLayer) for layer in model.modules()) + 1)]


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Each token as text, harmless; bytes that are no character of their own as ``\\xNN``."""
    pieces = []
    for one in ids:
        known = 0 <= one < tokenizer.vocab_size
        text = tokenizer.decode_bytes([one]).decode("utf-8", "backslashreplace") if known else f"<|no token {one}|>"
        pieces.append(visible(text))
    return pieces
