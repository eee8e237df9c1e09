"""A stack of the house's layers as an expert: [B, S, H] to [B, S, H], and token by token.

Shapes: B rows, S positions, H hidden, G heads of keys and values, D head dim.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import Module

from megatron_vpmoe.model.attention import grape
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.block import VPTransformerBlock, VPTransformerLayer
from megatron_vpmoe.model.compilation import of_any_columns, of_any_rows, part
from megatron_vpmoe.model.layer_specs import block_spec
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.think.decoding import Entry, Past
from megatron_vpmoe.think.stored_attention import attended, store


class StackExpert(Module):
    """All layers of a configuration and the norm behind them.

    Transformer layers are those that nano_think has: RoPE, attention to the whole document, a dense feed-forward, no
    sinks and no value residual.

    Args:
        config: of the layers; process groups must exist.

    Attributes:
        compiled_step: whether transformer layers' part of ``step`` is (``generation.compiled_step``).
    """

    compiled_step = False

    def __init__(self, config: VPTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.stack = VPTransformerBlock(
            config=config,
            spec=block_spec(config, range(1, config.num_layers + 1)),
            pre_process=True,
            post_process=True,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        for layer in self._layers():
            if isinstance(layer, VPTransformerLayer) and not _is_plain(layer):
                raise ValueError(f"layer {layer.layer_number} is not one that an expert decodes")

    def forward(self, x_BSH: Tensor, layout: SequenceLayout, past: Past | None = None) -> Tensor:
        """[B, S, H], normed.

        Args:
            x_BSH: hidden states.
            layout: documents and positions.
            past: receives what the layers keep of a single row, where it is to be continued.
        """
        computed: dict[int, Any] = {}
        hidden_SBH, _ = self.stack(x_BSH.transpose(0, 1), layout, None if past is None else computed)
        if past is not None:
            for number, kept in computed.items():
                for name, value in _entries_of(kept).items():
                    past.put(_name(number, name), value)
        return hidden_SBH.transpose(0, 1)

    def entries(self) -> dict[str, Entry]:
        """What decoding keeps of each layer."""
        found: dict[str, Entry] = {}
        for layer in self._layers():
            if isinstance(layer, VPTransformerLayer):
                attention = layer.self_attention
                shape = (2, attention.num_groups, attention.head_dim)
                found[_name(layer.layer_number, "kept")] = Entry(shape, attention.linear_proj.weight.dtype, grows=True)
            else:
                found |= {_name(layer.layer_number, name): entry for name, entry in layer.entries().items()}
        return found

    def step(self, x_BH: Tensor, position_B: Tensor, state: dict[str, Tensor]) -> Tensor:
        """[B, H] for one new token a row.

        Args:
            x_BH: hidden states.
            position_B: int64, where it stands in its document.
            state: of ``entries``, [B, ...]; goes on in place.
        """
        hidden_BH = x_BH
        for layer in self._layers():
            if isinstance(layer, VPTransformerLayer):
                stored = state[_name(layer.layer_number, "kept")]
                frequency_F = grape.rope_frequencies(
                    layer.self_attention.head_dim, self.config.rotary_base, x_BH.device
                )
                angle_B1F = grape.rotation_angles(position_B.unsqueeze(1), frequency_F)[0]
                if self.compiled_step:
                    of_any_rows(hidden_BH, angle_B1F, position_B)
                    of_any_columns(stored)
                step = part(_transformed, self.compiled_step)
                hidden_BH = step(layer, hidden_BH, angle_B1F, position_B, stored)
            else:
                own = {name: state[_name(layer.layer_number, name)] for name in layer.entries()}
                hidden_BH = layer.step(hidden_BH, own)
        return cast(Module, self.stack.final_layernorm)(hidden_BH)

    def _layers(self) -> list[Any]:
        return list(self.stack.layers)


def _transformed(
    layer: VPTransformerLayer, x_BH: Tensor, angle_B1F: Tensor, position_B: Tensor, stored_BC2GD: Tensor
) -> Tensor:
    query, key, value, _ = layer.before_attention(x_BH.unsqueeze(0), angle_B1F.unsqueeze(0), None)
    store(stored_BC2GD, position_B, torch.stack([key.squeeze(2), value.squeeze(2)], 1))
    taken_1BN = attended(stored_BC2GD, position_B, query).squeeze(2).flatten(1).unsqueeze(0)
    hidden_1BH, normed_1BH = layer.behind_attention(x_BH.unsqueeze(0), taken_1BN)
    out, bias = layer.dense(normed_1BH)
    return (hidden_1BH + (out if bias is None else out + bias)).squeeze(0)


def _entries_of(kept: Any) -> dict[str, Tensor]:
    """Of a layer: what it keeps under names of its own; of a transformer layer keys and values [1, G, S, D]."""
    if isinstance(kept, tuple):
        return {"kept": torch.stack([one[0].transpose(0, 1) for one in kept], 1)}
    return kept


def _name(number: int, entry: str) -> str:
    return f"layer_{number}.{entry}"


def _is_plain(layer: VPTransformerLayer) -> bool:
    attention = layer.self_attention
    extras = attention.window, attention.sink, attention.value_residual_scale, attention.tpa
    return all(one is None for one in extras) and attention.position_embedding == "rope" and not layer.is_moe_layer
