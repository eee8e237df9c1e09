"""The one loop in which logits exist: a bounded number of tokens at a time, with all that is made of them on the way.

The logits of a chunk of tokens exist once. While they do, a reading takes its values from them and leaves their
gradient, and the loop makes of it the chunk's gradient by the hidden states and its share of the gradient by the output
projection. So nothing of the size [N, V] is ever kept.

With the vocabulary split over tensor-parallel ranks each holds V columns of the logits. Ranks agree on each token's
log-sum-exp by a maximum and a sum, and on the logits of single ids by a sum to which only an id's owner contributes.

Shapes: N tokens, n tokens of a chunk, H hidden, V vocabulary on this rank, K ids of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vpmoe.config.memory import LOGITS_CHUNK_BYTES

# Logits and fp32 probabilities of one chunk: bounds the extra memory at any vocabulary size. With each chunk the whole
# gradient of the projection is read and written once, which on a GPU takes as long as the products of 128 rows.
CHUNK_BYTES, CHUNK_BYTES_OF_A_GPU = LOGITS_CHUNK_BYTES["cpu"], LOGITS_CHUNK_BYTES["cuda"]
_TILE = 128  # rows of one tile of a GPU's product

Read = Callable[[slice, Tensor, list[Tensor]], Tensor | None]
"""``read(rows, logits_nV, wide)``: the values of a chunk, and its gradient by the logits, fp32 [n, V] in one of the
buffers ``wide`` (None: there is none). The last buffer may be the logits' own."""


def wide_dtype(hidden: Tensor) -> torch.dtype:
    """What values and sums are kept in: fp32, or wider if the hidden states are."""
    return torch.promote_types(hidden.dtype, torch.float32)


def over_chunks(
    hidden_NH: Tensor,
    projection_VH: Tensor,
    read: Read,
    wanted: tuple[bool, bool],
    *,
    buffers: int = 1,
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Read the logits of all tokens; returns the gradients of hidden states and projection that are ``wanted``.

    Args:
        hidden_NH: hidden states, any floating dtype.
        projection_VH: the output projection, or this rank's rows of it.
        read: see ``Read``.
        wanted: which gradients to make.
        buffers: how many ``read`` works in; together with the logits they take CHUNK_BYTES (on a GPU
            those of one).
        into: where the projection's gradient is added; None makes a tensor for it.

    Returns:
        [N, H] in the dtype of the hidden states, and [V, H] in fp32 or wider: it sums over chunks, and what is small
        against a sum in bf16 is lost.
    """
    count, vocab, wide = len(hidden_NH), len(projection_VH), wide_dtype(hidden_NH)
    grad_hidden = torch.empty_like(hidden_NH) if wanted[0] else None
    grad_projection, fresh = into, into is None
    if fresh and wanted[1]:
        # Of no tokens the gradient is zero, not absent.
        grad_projection = (torch.empty_like if count else torch.zeros_like)(projection_VH, dtype=wide)
    # The CPU's softmax may write where it reads; that of other devices need not.
    in_place = hidden_NH.is_cpu and hidden_NH.dtype == wide
    row_bytes = vocab * (buffers * wide.itemsize + (0 if in_place else hidden_NH.itemsize))
    rows = max(1, min(count, _rows_of_a_chunk(row_bytes, on_cpu=hidden_NH.is_cpu)))
    logits_nV = hidden_NH.new_empty(rows, vocab)
    apart = [hidden_NH.new_empty(rows, vocab, dtype=wide) for _ in range(buffers - 1 if in_place else buffers)]
    wide_nV = [*apart, logits_nV] if in_place else apart
    for begin in range(0, count, rows):
        chunk = slice(begin, begin + rows)
        hidden_nH = hidden_NH[chunk]
        size = len(hidden_nH)
        torch.mm(hidden_nH, projection_VH.t(), out=logits_nV[:size])
        gradient = read(chunk, logits_nV[:size], [buffer[:size] for buffer in wide_nV])
        if gradient is None:
            continue
        narrow = gradient if hidden_NH.dtype == wide else logits_nV[:size].copy_(gradient)
        if grad_hidden is not None:
            torch.mm(narrow, projection_VH, out=grad_hidden[chunk])
        if grad_projection is not None:
            _add_product(grad_projection, narrow, gradient, hidden_nH, beta=0 if fresh and begin == 0 else 1)
    return grad_hidden, grad_projection


def _rows_of_a_chunk(row_bytes: int, *, on_cpu: bool) -> int:
    """As many as the bound allows; on a GPU of whole tiles."""
    if on_cpu:
        return CHUNK_BYTES // row_bytes
    rows = CHUNK_BYTES_OF_A_GPU // row_bytes
    return rows // _TILE * _TILE or rows


def _add_product(sum_VH: Tensor, narrow_nV: Tensor, wide_nV: Tensor, hidden_nH: Tensor, *, beta: int) -> None:
    """sum · beta + gradientᵀ · hidden, summed in the dtype of ``sum_VH``."""
    if hidden_nH.dtype == sum_VH.dtype or hidden_nH.is_cpu:
        # The CPU has no product of bf16 factors with an fp32 result.
        sum_VH.addmm_(wide_nV.t(), hidden_nH.to(sum_VH.dtype), beta=beta)
    else:
        torch.addmm(sum_VH, narrow_nV.t(), hidden_nH, beta=beta, out_dtype=sum_VH.dtype, out=sum_VH)


def main_grad(projection_VH: Tensor) -> Tensor | None:
    """Megatron-Core's buffer for the projection's gradient, where it is wider than the projection: else None.

    What is added there is never rounded to bf16. Autograd then gets zeros, not None: the hooks of DDP and the other
    half of a tied embedding add to them.
    """
    buffer = getattr(projection_VH, "main_grad", None)
    return None if buffer is None or buffer.dtype == projection_VH.dtype else buffer


@dataclass(frozen=True)
class Distribution:
    """softmax(logits / temperature) of a chunk; the buffer holds this rank's columns of it, up to a factor a row.

    Attributes:
        buffer_nV: probabilities divided by ``share``.
        share_n: see there.
        log_sum_exp_n: of the logits over temperature, over the whole vocabulary.
        log_q_nK: log-probabilities of the ids.
        gap_nK: by how much the largest logit of all exceeds theirs, over temperature; 0 of an id that has it.
        log_tail_n: log of the probability of all that is not an id; None if it is not asked for.
        ids_nK: columns of this rank's ids; those of other ranks repeat one of them, or are 0 where it owns none.
        mine_nK: which ids are this rank's.
    """

    buffer_nV: Tensor
    share_n: Tensor
    log_sum_exp_n: Tensor
    log_q_nK: Tensor
    gap_nK: Tensor
    log_tail_n: Tensor | None
    ids_nK: Tensor
    mine_nK: Tensor

    @classmethod
    def of(
        cls,
        logits_nV: Tensor,
        buffer_nV: Tensor,
        ids_nK: Tensor,
        tp_group: dist.ProcessGroup | None,
        *,
        temperature: float = 1.0,
        tail: bool = False,
    ) -> Distribution:
        """Overwrites ``buffer_nV``, which may be the logits' own."""
        ranks = 1 if tp_group is None else tp_group.size()
        mine, own = owned(ids_nK, logits_nV.shape[-1], tp_group)
        largest = logits_nV.amax(-1).to(buffer_nV.dtype)
        at_ids = logits_nV.gather(-1, own).to(largest.dtype)
        if temperature == 1.0:
            torch.softmax(logits_nV, dim=-1, dtype=buffer_nV.dtype, out=buffer_nV)
            # The largest logit has probability 1 / Σ exp(x - largest): the sum, without a pass that exponentiates.
            own_sum = held_sum = 1.0 / buffer_nV.amax(-1)
        else:
            buffer_nV.copy_(logits_nV).sub_(largest.unsqueeze(-1)).div_(temperature).exp_()
            own_sum, held_sum = buffer_nV.sum(-1), torch.ones_like(largest)
        parts = [own_sum.unsqueeze(-1)]
        if tail:
            scatter(buffer_nV, own, mine, torch.zeros_like(at_ids))
            parts.append((buffer_nV.sum(-1) * held_sum).unsqueeze(-1))
        if ranks == 1:
            gap = (largest.unsqueeze(-1) - at_ids) / temperature
        else:
            own_largest = largest.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tp_group)
            lower = torch.exp((own_largest - largest) / temperature)
            held_sum = held_sum * lower
            gap = torch.where(mine, (largest.unsqueeze(-1) - at_ids) / temperature, 0.0)
            summed = torch.cat([*(part * lower.unsqueeze(-1) for part in parts), gap], dim=-1)
            dist.all_reduce(summed, group=tp_group)
            parts, gap = list(summed[:, : len(parts)].split(1, dim=-1)), summed[:, len(parts) :]
        total = parts[0].squeeze(-1)
        log_tail = None
        if tail:
            least = torch.finfo(total.dtype).tiny
            log_tail = (parts[1].squeeze(-1) / total).clamp(min=least).log()
        log_q = -(parts[0].log() + gap)
        # Of one process and temperature 1 the quotient is 1.0 exactly: the buffer holds the probabilities.
        return cls(buffer_nV, held_sum / total, largest / temperature + total.log(), log_q, gap, log_tail, own, mine)

    def gradient(self, outside_n: Tensor, at_ids_nK: Tensor) -> Tensor:
        """``outside`` times the probability in every column but the ids', which get ``at_ids``; in the buffer."""
        self.buffer_nV.mul_((outside_n * self.share_n).unsqueeze(-1))
        return scatter(self.buffer_nV, self.ids_nK, self.mine_nK, at_ids_nK)


def owned(ids_nK: Tensor, vocab: int, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Which of the ids this rank owns, and their columns as ``Distribution.ids_nK`` has them."""
    if tp_group is not None:
        ids_nK = ids_nK - tp_group.rank() * vocab
    mine = (ids_nK >= 0) & (ids_nK < vocab)
    own = torch.where(mine, ids_nK, 0)
    return mine, torch.where(mine, own, own.gather(-1, _one_of(mine)))


def scatter(buffer_nV: Tensor, ids_nK: Tensor, mine_nK: Tensor, values_nK: Tensor) -> Tensor:
    """Set the columns of this rank's ids in place; every other column stays."""
    values = torch.where(mine_nK, values_nK, values_nK.gather(-1, _one_of(mine_nK)))
    # A column that two entries name gets the same value from both: the order of writing is nobody's choice.
    values = torch.where(mine_nK.any(-1, keepdim=True), values, buffer_nV.gather(-1, ids_nK))
    return buffer_nV.scatter_(-1, ids_nK, values)


def _one_of(mine_nK: Tensor) -> Tensor:
    """The place of an id that is this rank's, [n, 1]; 0 where none is."""
    return mine_nK.to(torch.uint8).argmax(-1, keepdim=True)
