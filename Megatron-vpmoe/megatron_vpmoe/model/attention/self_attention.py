"""Self-attention of one layer, local or global, from the hidden state to its projected output.

Order of operations: project (grouped-query or tensor-product), norm queries and keys, rotate them (not on GRAPE-A
layers), mix layer 1's values in, append to the cache when decoding, attend, project back.

Shapes: S new tokens, B batch, H query heads, G KV groups, P = H / G heads a group, D head dim, K keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor
from torch.nn import Parameter

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.model.attention.backends import core_attention, select_backend
from megatron_vpmoe.model.attention.grape import (
    alibi_slopes,
    initial_log_frequencies,
    rope_frequencies,
    rotate,
    rotation_angles,
)
from megatron_vpmoe.model.attention.kv_cache import KVCache
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.attention.tpa import TPAGeometry, contract_factors, factor_a_init, section_rows
from megatron_vpmoe.model.attention.value_residual import mix_first_value
from megatron_vpmoe.model.recompute import recomputed
from megatron_vpmoe.model.transformer_config import VPTransformerConfig


@dataclass
class VPSelfAttentionSubmodules:
    """The parts of `VPSelfAttention`.

    Attributes:
        linear_qkv: column-parallel linear; in tensor-product layers both factor projections are built from it.
        linear_proj: row-parallel linear of the output.
        q_layernorm: norm over the head dimension of queries, or None.
        k_layernorm: the same for keys.
    """

    linear_qkv: ModuleSpec | type
    linear_proj: ModuleSpec | type
    q_layernorm: ModuleSpec | type | None = None
    k_layernorm: ModuleSpec | type | None = None


class VPSelfAttention(MegatronModule):
    """Causal self-attention over packed documents.

    Parameters that stay fp32 in a bf16 model (``keep_fp32``): ``sink`` [H], ``grape_log_freq`` [D/2] and
    ``value_residual_scale`` []. Weights that stack several logical matrices name their rows in ``matrix_rows``.

    Args:
        config: of the model.
        submodules: the parts.
        layer_number: global, 1-based; decides between local and global, and which layer gives the first values.
        pg_collection: process groups; the tensor-parallel group must be of size 1.

    Raises:
        ConfigError: tensor parallelism, or a kind of softmax, position or backend that this layer does not have.
    """

    config: VPTransformerConfig

    def __init__(
        self,
        config: VPTransformerConfig,
        submodules: VPSelfAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        self.tp_group = pg_collection.tp
        if self.tp_group.size() != 1:
            raise ConfigError(
                f"attention is not split over {self.tp_group.size()} tensor-parallel ranks",
                source="tensor_model_parallel_size",
                remedy="tensor_model_parallel_size: 1",
            )
        self.layer_number = layer_number
        self.num_heads, self.num_groups = config.num_attention_heads, _present(config.num_query_groups)
        self.head_dim = _present(config.kv_channels)
        is_global = config.is_global_layer(layer_number)
        self.window = None if is_global else config.window_size_tokens
        self.position_embedding = config.global_position_embedding if is_global else config.local_position_embedding
        self.softmax_scale = config.softmax_scale or self.head_dim**-0.5
        self._build_projections(submodules, tensor_product=config.tpa and not is_global)
        self._build_scalars()

    def _build_projections(self, submodules: VPSelfAttentionSubmodules, *, tensor_product: bool) -> None:
        config, per_group = self.config, self.num_heads // self.num_groups
        column = functools.partial(
            build_module,
            submodules.linear_qkv,
            config.hidden_size,
            config=config,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )
        qkv_size = self.num_groups * (per_group + 2) * self.head_dim
        self.tpa: TPAGeometry | None = None
        if tensor_product:
            self.tpa = TPAGeometry(self.num_heads, self.num_groups, self.head_dim, config.tpa_q_rank, config.tpa_rank)
            self.linear_tpa_a = column(
                sum(self.tpa.a_sizes), init_method=factor_a_init(self.tpa), bias=config.tpa_factor_bias
            )
            self.linear_tpa_b = column(sum(self.tpa.b_sizes), init_method=config.init_method, bias=False)
            self.linear_tpa_a.weight.matrix_rows = section_rows(self.tpa.a_sizes)
            self.linear_tpa_b.weight.matrix_rows = section_rows(self.tpa.b_sizes)
            self.qkv_bias = Parameter(torch.zeros(qkv_size, dtype=config.params_dtype)) if config.add_qkv_bias else None
        else:
            self.linear_qkv = column(qkv_size, init_method=config.init_method, bias=config.add_qkv_bias)
            self.linear_qkv.weight.matrix_rows = mixed_qkv_rows(self.num_heads, self.num_groups, self.head_dim)
        norm = {"hidden_size": self.head_dim, "config": config, "eps": config.layernorm_epsilon}
        self.q_layernorm = build_module(submodules.q_layernorm, **norm) if submodules.q_layernorm else None
        self.k_layernorm = build_module(submodules.k_layernorm, **norm) if submodules.k_layernorm else None
        self.linear_proj = build_module(
            submodules.linear_proj,
            self.num_heads * self.head_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def _build_scalars(self) -> None:
        config = self.config
        if config.softmax_type not in ("learnable", "vanilla"):
            raise ConfigError(
                f"softmax_type {config.softmax_type!r} is not offered",
                source="softmax_type",
                remedy="learnable or vanilla",
            )
        if self.position_embedding not in ("grape_m", "grape_a", "rope", "none"):
            raise ConfigError(
                f"there is no position embedding {self.position_embedding!r}",
                source="local_position_embedding, global_position_embedding",
                remedy="grape_m, grape_a, rope or none",
            )
        self.sink = _fp32_island(torch.zeros(self.num_heads)) if config.softmax_type == "learnable" else None
        self.grape_log_freq = None
        if self.position_embedding == "grape_m":
            self.grape_log_freq = _fp32_island(
                initial_log_frequencies(self.head_dim, config.rotary_base, config.grapem_log_freq_scale)
            )
        mixes = config.value_residual and self.layer_number > 1
        self.value_residual_scale = _fp32_island(torch.ones(())) if mixes else None

    def backend_name(self, device: torch.device) -> str:
        """The attention backend that runs this layer's whole sequences on ``device``."""
        alibi = self.position_embedding == "grape_a"
        return select_backend(self.config.attention_backend_name, window=self.window, device=device, alibi=alibi)

    def forward(
        self,
        hidden_SBH: Tensor,
        layout: SequenceLayout,
        first_value: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        """Attend from the new tokens to themselves and to the cached ones.

        Args:
            hidden_SBH: normed hidden states of the new tokens, the last S rows of the layout.
            layout: documents and positions of all keys, cached ones included.
            first_value: layer 1's values of the new tokens [S, B, G, D]; needed from layer 2 on by the value residual.
            kv_cache: past keys and values; receives the new ones.

        Returns:
            (output [S, B, hidden], bias [hidden] still to be added, or None), and this layer's own values before any
            mixing [S, B, G, D].
        """
        queries = hidden_SBH.shape[0]
        query, key, own_value = self.project_qkv(hidden_SBH)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        query, key = self._rotate(query, key, layout)
        value = self._mix_value(own_value, first_value)

        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if kv_cache is not None:
            key, value = kv_cache.append(self.layer_number, key, value, window=self.window)
            layout = layout.last(key.shape[2])
        slopes = alibi_slopes(self.num_heads, query.device) if self.position_embedding == "grape_a" else None
        attend = functools.partial(
            core_attention,
            layout=layout,
            window=self.window,
            alibi_slopes_H=slopes,
            sink_H=self.sink,
            softmax_scale=self.softmax_scale,
            backend=self.backend_name(query.device),
        )
        again = self.training and self.config.recomputation.recomputes("core_attn")
        out_BHSD = recomputed(attend, query, key, value) if again else attend(query, key, value)
        out_SBN = out_BHSD.permute(2, 0, 1, 3).reshape(queries, -1, self.num_heads * self.head_dim)
        return self.linear_proj(out_SBN), own_value

    def project_qkv(self, hidden_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [S, B, H, D], keys and values [S, B, G, D], biases included, before norm and positions."""
        if self.tpa is None:
            return split_mixed_qkv(self.linear_qkv(hidden_SBH)[0], self.num_heads, self.num_groups)
        qkv = contract_factors(self.linear_tpa_a(hidden_SBH)[0], self.linear_tpa_b(hidden_SBH)[0], self.tpa)
        if self.qkv_bias is None:
            return qkv
        query, key, value = (
            x + bias
            for x, bias in zip(qkv, split_mixed_qkv(self.qkv_bias, self.num_heads, self.num_groups), strict=True)
        )
        return query, key, value

    def _rotate(self, query: Tensor, key: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        position_BS = layout.position[:, -query.shape[0] :]
        if self.grape_log_freq is not None:
            frequency = torch.exp(self.grape_log_freq / self.config.grapem_log_freq_scale)
            angle = rotation_angles(position_BS, frequency)
        elif self.position_embedding == "rope":

            def angles() -> Tensor:
                frequency = rope_frequencies(self.head_dim, self.config.rotary_base)
                return rotation_angles(position_BS, frequency.to(query.device))

            angle = layout.shared(("rope", query.shape[0], self.head_dim, self.config.rotary_base), angles)
        else:
            return query, key
        return rotate(query, angle), rotate(key, angle)

    def _mix_value(self, value: Tensor, first_value: Tensor | None) -> Tensor:
        if self.value_residual_scale is None:
            return value
        if first_value is None:
            raise ValueError(f"layer {self.layer_number} mixes layer 1's values and was not given them")
        return mix_first_value(value, first_value, self.value_residual_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VPSelfAttention:
        """Moves and casts as usual, except that fp32 islands never lose precision: a cast to bf16 leaves them fp32."""
        islands = [p for p in self.parameters(recurse=False) if getattr(p, "keep_fp32", False)]
        kept = {id(tensor) for p in islands for tensor in (p, p.grad) if tensor is not None}

        def careful(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            narrowed = applied.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(applied.device) if narrowed and id(tensor) in kept else applied

        return super()._apply(careful, recurse)


def split_mixed_qkv(qkv: Tensor, num_heads: int, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [..., H, D], keys and values [..., G, D] from Megatron's mixed layout [..., G·(P + 2)·D].

    For each group the layout holds its P = H / G queries, then its key, then its value.
    """
    per_group = num_heads // num_groups
    mixed = qkv.unflatten(-1, (num_groups, per_group + 2, -1))
    query, key, value = mixed.split([per_group, 1, 1], dim=-2)
    return query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)


def mixed_qkv_rows(num_heads: int, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """int64 row indices of the query, key and value matrices in a weight of Megatron's mixed layout."""
    rows = torch.arange((num_heads + 2 * num_groups) * head_dim, device="cpu")
    query, key, value = split_mixed_qkv(rows, num_heads, num_groups)
    return query.flatten(), key.flatten(), value.flatten()


def _fp32_island(initial: Tensor) -> Parameter:
    parameter = Parameter(initial.float())
    parameter.keep_fp32 = True  # type: ignore[attr-defined]
    return parameter


def _present(value: int | None) -> int:
    if value is None:
        raise ConfigError("num_query_groups and kv_channels must be given", source="model", remedy="set both")
    return value
