"""A layer of a selective state space model: S6, the block of Mamba (Gu and Dao 2023, arXiv 2312.00752, figure 3).

What attention looks up, a state of fixed size carries on: of each of I channels N numbers, and the last K - 1 inputs of
the convolution. Both restart with each document.

Shapes: B rows, S positions, T = B S, H hidden, I inner channels, N numbers of state a channel, K taps of the
convolution, R rank of the step, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, cast

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import Parameter, functional

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.compilation import of_any_rows, part
from megatron_vpmoe.model.norm import RMSNorm
from megatron_vpmoe.model.precision import fp32_island
from megatron_vpmoe.model.tensor_parallel import ReplicatedLinear
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.runtime.ranges import annotated
from megatron_vpmoe.think.decoding import Entry, Past
from megatron_vpmoe.think.scan import selective_scan

_FIRST_STEPS = 1e-3, 1e-1
"""Between which steps begin, log-uniformly, so that channels remember tens to a thousand tokens (section E.2)."""


class StateSpaceLayer(MegatronModule):
    """Pre-norm mixer, added to the residual stream: in the place of a transformer layer's two parts.

    Built by ModuleSpec as ``layer(config=, layer_number=, pg_collection=, vp_stage=)``.

    Attributes:
        compiled_step: whether ``step`` is (``generation.compiled_step``).
    """

    compiled_step = False

    def __init__(self, config: VPTransformerConfig, layer_number: int = 1, **_upstream: Any) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.input_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mixer = StateSpaceMixer(
            config,
            inner=config.ssm_inner_size,
            states=config.ssm_state_size,
            taps=config.ssm_conv_size,
            step_rank=config.ssm_step_rank,
        )

    def forward(
        self,
        hidden_SBH: Tensor,
        layout: SequenceLayout,
        first_value: Tensor | None,
        computed: dict[int, Any] | None,
        _real: object,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``VPTransformerLayer``; ``computed`` receives what ``Past.values`` holds, under the layer's number."""
        past = None if computed is None else Past.of(layout)
        with annotated("state_space"):
            mixed_BSH = self.mixer(self.input_layernorm(hidden_SBH).transpose(0, 1), layout, past)
        if computed is not None and past is not None:
            computed[self.layer_number] = past.values
        return hidden_SBH + mixed_BSH.transpose(0, 1), first_value

    def entries(self) -> dict[str, Entry]:
        """Of a row's state."""
        return self.mixer.entries()

    def step(self, hidden_BH: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The layer for one new token a row; ``state`` goes on in place."""
        if self.compiled_step:
            of_any_rows(hidden_BH, *state.values())
        return part(StateSpaceLayer._stepped, self.compiled_step)(self, hidden_BH, state)

    def _stepped(self, hidden_BH: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return hidden_BH + self.mixer.step(self.input_layernorm(hidden_BH), state)


class StateSpaceMixer(MegatronModule):
    """[B, S, H] -> [B, S, H]: projection, convolution, selective scan, gate, projection back.

    Step, decay and scan are fp32 or wider; so are A, D and the step's bias in a bf16 model.

    Args:
        config: of the model.
        inner: I.
        states: N.
        taps: K.
        step_rank: R.
    """

    def __init__(self, config: VPTransformerConfig, *, inner: int, states: int, taps: int, step_rank: int) -> None:
        super().__init__(config)
        self._sizes = step_rank, states, states
        init = cast(Any, config.init_method)
        self.in_proj = ReplicatedLinear(config, config.hidden_size, 2 * inner, init_method=init)
        self.conv_weight = Parameter(torch.empty(inner, taps))
        self.conv_bias = Parameter(torch.zeros(inner))
        self.x_proj = ReplicatedLinear(config, inner, step_rank + 2 * states, init_method=init)
        self.dt_proj = ReplicatedLinear(config, step_rank, inner, init_method=_even(step_rank))
        low, high = map(math.log, _FIRST_STEPS)
        first_step = torch.exp(low + (high - low) * torch.rand(inner))
        self.dt_bias = fp32_island(first_step + torch.log(-torch.expm1(-first_step)))  # softplus takes it back
        self.A_log = fp32_island(torch.arange(1.0, states + 1).log()[:, None].repeat(1, inner))
        self.D = fp32_island(torch.ones(inner))
        self.out_proj = ReplicatedLinear(
            config, inner, config.hidden_size, init_method=cast(Any, config.output_layer_init_method)
        )
        # What the optimizer is to see as several matrices.
        _fused(self.in_proj.weight, inner, inner)
        _fused(self.x_proj.weight, *self._sizes)
        if config.perform_initialization:
            _even(taps)(self.conv_weight)

    def forward(self, x_BSH: Tensor, layout: SequenceLayout, past: Past | None = None) -> Tensor:
        """All positions.

        Args:
            x_BSH: normed.
            layout: documents.
            past: receives ``entries``, where the documents of one row are to be continued.
        """
        age_T = layout.shared("age", lambda: _age(layout))
        entered_TI, gate_TI = self.in_proj(x_BSH.flatten(0, 1)).chunk(2, dim=-1)
        u_TI = functional.silu(self._convolved(entered_TI, age_T))
        step_TI, b_TN, c_TN = self._chosen(u_TI)
        wide_TI, a_NI = u_TI.to(step_TI.dtype), -torch.exp(self.A_log)
        if past is None:
            y_TI, _ = selective_scan(step_TI, wide_TI, a_NI, b_TN, c_TN, age_T == 0)
        else:
            y_TI, state_DNI = torch.zeros_like(wide_TI), a_NI.new_empty(len(past.spans), *a_NI.shape)
            for number, span in enumerate(past.spans):
                of_document = (each[span] for each in (b_TN, c_TN, age_T == 0))
                y_TI[span], state_DNI[number] = selective_scan(step_TI[span], wide_TI[span], a_NI, *of_document)
            past.put("state", state_DNI)
            past.put("inputs", self._last_inputs(entered_TI, past))
        return self._gated(y_TI, wide_TI, gate_TI).view_as(x_BSH)

    def entries(self) -> dict[str, Entry]:
        """The convolution's last inputs, oldest first, and the scan's state."""
        inner, taps = self.conv_weight.shape
        return {
            "inputs": Entry((taps - 1, inner), self.conv_weight.dtype),
            "state": Entry(tuple(self.A_log.shape), self.A_log.dtype),
        }

    def step(self, x_BH: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """One new token a row.

        Args:
            x_BH: normed.
            state: of ``entries``, [B, ...]; goes on in place.
        """
        entered_BI, gate_BI = self.in_proj(x_BH).chunk(2, dim=-1)
        inputs_BKI = torch.cat([state["inputs"], entered_BI[:, None]], dim=1)
        u_BI = functional.silu((inputs_BKI * self.conv_weight.t()).sum(1) + self.conv_bias)
        state["inputs"].copy_(inputs_BKI[:, 1:])
        step_BI, b_BN, c_BN = self._chosen(u_BI)
        wide_BI, h_BNI = u_BI.to(step_BI.dtype), state["state"]
        h_BNI.mul_(torch.exp(step_BI[:, None] * -torch.exp(self.A_log)))
        h_BNI.addcmul_((step_BI * wide_BI)[:, None], b_BN[:, :, None])
        return self._gated((h_BNI * c_BN[:, :, None]).sum(1), wide_BI, gate_BI)

    def _convolved(self, x_TI: Tensor, age_T: Tensor) -> Tensor:
        """Each channel's last K inputs of its document, weighted; the last tap is the token itself."""
        taps = self.conv_weight.shape[1]
        out_TI = torch.addcmul(self.conv_bias, x_TI, self.conv_weight[:, -1])
        for back in range(1, min(taps, len(x_TI))):
            before = x_TI[:-back].masked_fill((age_T[back:] < back)[:, None], 0.0)
            out_TI = out_TI + functional.pad(before * self.conv_weight[:, -1 - back], (0, 0, back, 0))
        return out_TI

    def _chosen(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step [.., I], B and C [.., N] of each token, fp32 or wider."""
        low, b, c = self.x_proj(u).split(self._sizes, dim=-1)
        wide = self.dt_bias.dtype
        return functional.softplus(self.dt_proj(low).to(wide) + self.dt_bias), b.to(wide), c.to(wide)

    def _gated(self, y: Tensor, u: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj((y + self.D * u).to(gate.dtype) * functional.silu(gate))

    def _last_inputs(self, x_TI: Tensor, past: Past) -> Tensor:
        """[D, K - 1, I]; zeros before a document's first token."""
        kept = self.conv_weight.shape[1] - 1
        last = [x_TI[max(span.start, span.stop - kept) : span.stop] for span in past.spans]
        return torch.stack([functional.pad(each, (0, 0, kept - len(each), 0)) for each in last])


def _even(fan_in: int) -> Any:
    """Weights between plus and minus 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda weight: torch.nn.init.uniform_(weight, -bound, bound)


def _fused(weight: Any, *rows: int) -> None:
    """Declare that the weight's rows are of so many matrices."""
    ends = [*accumulate(rows)]
    weight.matrix_rows = tuple(slice(end - count, end) for end, count in zip(ends, rows, strict=True))


def _age(layout: SequenceLayout) -> Tensor:
    """int64 [T]: how many tokens of its document and row stand before each position."""
    document = layout.document_id
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    column = torch.arange(document.shape[1], device=document.device)
    return (column - torch.where(begins, column, 0).cummax(dim=1).values).flatten()
