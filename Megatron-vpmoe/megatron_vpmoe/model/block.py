"""The stack of layers: what one layer does with the residual stream, and what spans layers.

Two things travel beside the hidden states, as explicit arguments: the layout of the packed documents, which every
attention reads, and the values of layer 1, which the value residual mixes into every later layer.

Shapes: S sequence, B batch, H hidden, G KV groups, D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import Module

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.compilation import part
from megatron_vpmoe.model.moe.real_tokens import RealTokens
from megatron_vpmoe.model.recompute import recomputed
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.runtime.ranges import annotated


class VPTransformerLayer(TransformerLayer):
    """Pre-norm attention and feed-forward (dense or MoE), each added to the residual stream."""

    config: VPTransformerConfig

    def forward(  # type: ignore[override]
        self,
        hidden_SBH: Tensor,
        layout: SequenceLayout,
        first_value_SBGD: Tensor | None,
        computed: dict[int, tuple[Tensor, Tensor]] | None,
        real: RealTokens | None,
    ) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            hidden_SBH: the residual stream.
            layout: which positions belong to which document.
            first_value_SBGD: the values of layer 1; None in layer 1 itself.
            computed: receives each layer's keys and values; None where nothing goes on from them.
            real: which tokens are no padding, for the routers' bookkeeping.

        Returns:
            the residual stream, and the values of layer 1.
        """
        attention, compiled = self.self_attention, self._is_compiled()
        with annotated("attention"):
            query, key, value, own_SBGD = part(VPTransformerLayer.before_attention, compiled)(
                self, hidden_SBH, attention.turns(layout), first_value_SBGD
            )
            attended_SBN = attention.attend(query, key, value, layout, computed)
            hidden_SBH, normed = part(VPTransformerLayer.behind_attention, compiled)(self, hidden_SBH, attended_SBN)
        mlp_out, mlp_bias = self._feed_forward(normed, real)
        first = own_SBGD if first_value_SBGD is None else first_value_SBGD
        return _add(hidden_SBH, mlp_out, mlp_bias), first

    def before_attention(
        self, hidden_SBH: Tensor, turns: Tensor | None, first_value_SBGD: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``VPSelfAttention.before_scores`` of the normed residual stream."""
        return self.self_attention.before_scores(self.input_layernorm(hidden_SBH), turns, first_value_SBGD)

    def behind_attention(self, hidden_SBH: Tensor, attended_SBN: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream with the attention's projected output, and what the feed-forward reads of it."""
        hidden_SBH = _add(hidden_SBH, *self.self_attention.linear_proj(attended_SBN))
        return hidden_SBH, self.pre_mlp_layernorm(hidden_SBH)

    def _feed_forward(self, normed_SBH: Tensor, real: RealTokens | None) -> tuple[Tensor, Tensor | None]:
        again = self.training and self.config.recomputation.recomputes("moe" if self.is_moe_layer else "mlp")
        keywords = {"padding_mask": real} if self.is_moe_layer else {}
        run = self.mlp
        if not self.is_moe_layer:
            run = functools.partial(part(VPTransformerLayer.dense, self._is_compiled()), self)
        # Of a MoE layer, what is not router, experts or shared expert is the way of the tokens.
        with annotated("dispatch" if self.is_moe_layer else "feed_forward"):
            return recomputed(run, normed_SBH, **keywords) if again else run(normed_SBH, **keywords)

    def _is_compiled(self) -> bool:
        return self.training and self.config.compiled != "off"

    def dense(self, normed_SBH: Tensor) -> tuple[Tensor, Tensor | None]:
        """The feed-forward of a layer without experts: its output, and a bias that is still to be added."""
        return self.mlp(normed_SBH)


def _add(residual: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    return residual + (out if bias is None else out + bias)


class VPTransformerBlock(TransformerBlock):
    """The layers of one pipeline stage, and on the last stage the final norm."""

    config: VPTransformerConfig

    def forward(  # type: ignore[override]
        self,
        hidden_SBH: Tensor,
        layout: SequenceLayout,
        computed: dict[int, tuple[Tensor, Tensor]] | None = None,
        real: RealTokens | None = None,
        first_value: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run every layer.

        Args:
            hidden_SBH: the embedded tokens, or the residual stream of the stage before.
            layout: which positions belong to which document.
            computed: receives each layer's keys and values; None where nothing goes on from them.
            real: which tokens are no padding.
            first_value: layer 1's values [S, B, G, D] from the stage before; None on the first stage.

        Returns:
            the residual stream [S, B, H], normed on the last stage, and layer 1's values.
        """
        for layers, again in self.config.recomputation.runs(list(self.layers)):
            arguments = (layers, hidden_SBH, layout, first_value, computed, real)
            hidden_SBH, first_value = (
                recomputed(_run_layers, *arguments) if again and self.training else _run_layers(*arguments)
            )
        if self.final_layernorm is not None:
            hidden_SBH = self.final_layernorm(hidden_SBH)
        return hidden_SBH, first_value

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Keys carry the global layer number: local, global, dense and MoE layers have different parameters."""
        return super().sharded_state_dict(prefix, sharded_offsets, {**(metadata or {}), "non_homogeneous_layers": True})


def _run_layers(
    layers: Iterable[Module],
    hidden_SBH: Tensor,
    layout: SequenceLayout,
    first_value_SBGD: Tensor | None,
    computed: dict[int, tuple[Tensor, Tensor]] | None,
    real: RealTokens | None,
) -> tuple[Tensor, Tensor | None]:
    for layer in layers:
        hidden_SBH, first_value_SBGD = layer(hidden_SBH, layout, first_value_SBGD, computed, real)
    return hidden_SBH, first_value_SBGD
