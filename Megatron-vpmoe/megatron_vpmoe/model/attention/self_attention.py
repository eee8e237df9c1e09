"""Self-attention of one layer, local or global, from the hidden state to its projected output.

Order of operations: project (grouped-query or tensor-product), norm queries and keys, rotate them (not on GRAPE-A
layers), mix layer 1's values in, attend, project back.

Over tensor-parallel ranks heads and groups are split: every rank attends with its own, over the whole sequence. What
all heads share (B factors, norms, λs) is on every rank, and its gradient is summed over them.

Shapes: S sequence, B batch, H query heads, G KV groups, P = H / G heads a group, D head dim. H and G are
those of one tensor-parallel rank; under sequence parallelism a hidden state has S / T rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from megatron_vpmoe.model.attention import grape
from megatron_vpmoe.model.attention.backends import core_attention, select_backend
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.attention.mixed_qkv import mixed_qkv_rows, split_mixed_qkv
from megatron_vpmoe.model.attention.tpa import (
    TPAGeometry,
    contract_factors,
    factor_a_init,
    factor_a_sharding,
    section_rows,
)
from megatron_vpmoe.model.attention.value_residual import mix_first_value
from megatron_vpmoe.model.precision import fp32_island, without_narrowing
from megatron_vpmoe.model.recompute import recomputed
from megatron_vpmoe.model.tensor_parallel import ReplicatedLinear
from megatron_vpmoe.model.transformer_config import VPTransformerConfig

_Computed = dict[int, tuple[Tensor, Tensor]] | None


@dataclass
class VPSelfAttentionSubmodules:
    """The parts of `VPSelfAttention`.

    Attributes:
        linear_qkv: column-parallel linear; in tensor-product layers the projection to the A factors is built from it.
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
    ``value_residual_scale`` []. Weights that stack several logical matrices name their (local) rows in ``matrix_rows``.

    Args:
        config: of the model.
        submodules: the parts.
        layer_number: global, 1-based; decides between local and global, and which layer gives the first values.
        pg_collection: process groups; the tensor-parallel one is used.
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
        ranks = self.tp_group.size()
        self.layer_number = layer_number
        self.num_heads = config.num_attention_heads // ranks
        self.num_groups = cast(int, config.num_query_groups) // ranks
        self.head_dim = cast(int, config.kv_channels)
        is_global = config.is_global_layer(layer_number)
        self.window = None if is_global else config.window_size_tokens
        self.position_embedding = config.global_position_embedding if is_global else config.local_position_embedding
        self.softmax_scale = config.softmax_scale or self.head_dim**-0.5
        self._build_projections(submodules, tensor_product=config.tpa and not is_global)
        self._build_scalars()

    def _build_projections(self, submodules: VPSelfAttentionSubmodules, *, tensor_product: bool) -> None:
        config, ranks = self.config, self.tp_group.size()
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
        qkv_size = (self.num_heads + 2 * self.num_groups) * self.head_dim
        self.tpa: TPAGeometry | None = None
        if tensor_product:
            heads, groups = self.num_heads * ranks, self.num_groups * ranks
            whole = TPAGeometry(heads, groups, self.head_dim, config.tpa_q_rank, config.tpa_rank)
            self.tpa = whole.part(ranks)
            self.linear_tpa_a = column(
                sum(whole.a_sizes), init_method=factor_a_init(whole, ranks), bias=config.tpa_factor_bias
            )
            assert config.init_method is not None
            self.linear_tpa_b = ReplicatedLinear(
                config, config.hidden_size, sum(whole.b_sizes), init_method=config.init_method
            )
            self.linear_tpa_a.weight.matrix_rows = section_rows(self.tpa.a_sizes)
            self.linear_tpa_b.weight.matrix_rows = section_rows(self.tpa.b_sizes)  # type: ignore[attr-defined]
            self.qkv_bias = None
            if config.add_qkv_bias:
                self.qkv_bias = Parameter(torch.zeros(qkv_size, dtype=config.params_dtype))
                set_tensor_model_parallel_attributes(self.qkv_bias, is_parallel=True, dim=0, stride=1)
        else:
            self.linear_qkv = column(qkv_size * ranks, init_method=config.init_method, bias=config.add_qkv_bias)
            self.linear_qkv.weight.matrix_rows = mixed_qkv_rows(self.num_heads, self.num_groups, self.head_dim)
        norm = {"hidden_size": self.head_dim, "config": config, "eps": config.layernorm_epsilon}
        self.q_layernorm = build_module(submodules.q_layernorm, **norm) if submodules.q_layernorm else None
        self.k_layernorm = build_module(submodules.k_layernorm, **norm) if submodules.k_layernorm else None
        self.linear_proj = build_module(
            submodules.linear_proj,
            self.num_heads * ranks * self.head_dim,
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
        self.sink = None
        if config.softmax_type == "learnable":
            self.sink = fp32_island(torch.zeros(self.num_heads))
            set_tensor_model_parallel_attributes(self.sink, is_parallel=True, dim=0, stride=1)
        self.grape_log_freq = None
        if self.position_embedding == "grape_m":
            self.grape_log_freq = fp32_island(
                grape.initial_log_frequencies(self.head_dim, config.rotary_base, config.grapem_log_freq_scale)
            )
        mixes = config.value_residual and self.layer_number > 1
        self.value_residual_scale = fp32_island(torch.ones(())) if mixes else None

    def backend_name(self, device: torch.device, *, recurs: bool = True) -> str:
        """What runs this layer's whole sequences on ``device``; nothing is compiled for a shape that does not recur."""
        alibi = self.position_embedding == "grape_a"
        name = select_backend(self.config.attention_backend_name, window=self.window, device=device, alibi=alibi)
        return "reference" if name == "flex" and not recurs else name

    def forward(
        self, hidden_SBH: Tensor, layout: SequenceLayout, first_value: Tensor | None = None, computed: _Computed = None
    ) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        """Attend within documents.

        Args:
            hidden_SBH: normed; under sequence parallelism this rank's S / T of them.
            layout: documents and positions.
            first_value: layer 1's values [S, B, G, D]; needed from layer 2 on by the value residual.
            computed: receives, under the layer's number, keys as the scores read them and mixed values [B, G, S, D].

        Returns:
            (output, of the shape of ``hidden_SBH``, and bias [hidden] still to be added, or None), and this layer's own
            values before any mixing [S, B, G, D].
        """
        query, key, value, own_value = self.before_scores(hidden_SBH, self.turns(layout), first_value)
        return self.linear_proj(self.attend(query, key, value, layout, computed)), own_value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, computed: _Computed = None
    ) -> Tensor:
        """[S, B, H D]: what ``before_scores`` gave, attended to within documents; ``computed`` as in ``forward``."""
        if computed is not None:
            computed[self.layer_number] = key, value
        core = functools.partial(
            core_attention,
            layout=layout,
            window=self.window,
            alibi_slopes_H=self.slopes(query.device),
            sink_H=self.sink,
            softmax_scale=self.softmax_scale,
            backend=self.backend_name(query.device, recurs=layout.recurs),
        )
        again = self.training and self.config.recomputation.recomputes("core_attn")
        out_BHSD = recomputed(core, query, key, value) if again else core(query, key, value)
        return out_BHSD.permute(2, 0, 1, 3).flatten(2)

    def slopes(self, device: torch.device) -> Tensor | None:
        """fp32 [H]: GRAPE-A's, of this rank's heads; None on layers without."""
        if self.position_embedding != "grape_a":
            return None
        part, parts = self.tp_group.rank(), self.tp_group.size()
        return grape.alibi_slopes(self.num_heads * parts, device, part, parts)

    def before_scores(
        self, hidden_SBH: Tensor, turns: Tensor | None, first_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [B, H, S, D], keys and mixed values [B, G, S, D] as scores read them; own values [S, B, G, D].

        It reads tensors alone, of which ``turns`` gives one: compiled, it serves all batches.
        """
        query, key, own_value = self.scored_qkv(hidden_SBH, turns)
        value = self._mix_value(own_value, first_value)
        return query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), own_value

    def project_qkv(self, hidden_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [S, B, H, D], keys and values [S, B, G, D], biases included, before norm and positions."""
        if self.tpa is None:
            return split_mixed_qkv(self.linear_qkv(hidden_SBH)[0], self.num_heads, self.num_groups)
        factor_b = self.linear_tpa_b(hidden_SBH)
        # Every rank's heads read the B factors: the sum of what they send back is the gradient.
        if self.config.sequence_parallel:
            factor_b = gather_from_sequence_parallel_region(factor_b, group=self.tp_group)
        else:
            factor_b = copy_to_tensor_model_parallel_region(factor_b, group=self.tp_group)
        return contract_factors(self.linear_tpa_a(hidden_SBH)[0], factor_b, self.tpa, self.qkv_bias)

    def scored_qkv(self, hidden_SBH: Tensor, turns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``project_qkv`` with queries and keys as they meet in the scores: normed, and rotated where layers rotate."""
        query, key, value = self.project_qkv(hidden_SBH)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if turns is None:
            return query, key, value
        if self.grape_log_freq is not None:
            log_freq = copy_to_tensor_model_parallel_region(self.grape_log_freq, group=self.tp_group)
            turns = grape.rotation_angles(turns, torch.exp(log_freq / self.config.grapem_log_freq_scale))
        query, key = grape.rotate_all((query, key), turns)
        return query, key, value

    def turns(self, layout: SequenceLayout) -> Tensor | None:
        """What turns queries and keys: positions, where frequencies are learned, else shared angles; or None."""
        if self.grape_log_freq is not None:
            return layout.position_in(self.grape_log_freq.dtype)
        rope = self.position_embedding == "rope"
        return grape.rope_angles(layout, self.head_dim, self.config.rotary_base) if rope else None

    def _mix_value(self, value: Tensor, first_value: Tensor | None) -> Tensor:
        if self.value_residual_scale is None:
            return value
        if first_value is None:
            raise ValueError(f"layer {self.layer_number} mixes layer 1's values and was not given them")
        scale = copy_to_tensor_model_parallel_region(self.value_residual_scale, group=self.tp_group)
        return mix_first_value(value, first_value, scale)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Global tensors: heads and groups in the order of the whole layer, so any tensor-parallel size loads them."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        split = {name: p for name in ("sink", "qkv_bias") if (p := getattr(self, name, None)) is not None}
        state |= make_sharded_tensors_for_checkpoint(
            split,
            prefix,
            dict.fromkeys(split, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        if self.tpa is not None:
            for key in (f"{prefix}linear_tpa_a.weight", f"{prefix}linear_tpa_a.bias"):
                if key in state:
                    state[key] = factor_a_sharding(state[key], self.tpa)
        return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VPSelfAttention:
        """Moves and casts as usual, except that fp32 islands never lose precision: a cast to bf16 leaves them fp32."""
        islands = [p for p in self.parameters(recurse=False) if getattr(p, "keep_fp32", False)]
        return super()._apply(without_narrowing(fn, [x for p in islands for x in (p, p.grad)]), recurse)
