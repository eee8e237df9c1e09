"""The K likeliest ids of each position with their log-probabilities: what a teacher says, without a gradient.

Shapes: as in ``chunks``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vpmoe.model.output.chunks import Distribution, over_chunks, wide_dtype


@torch.no_grad()
def likeliest(
    hidden_NH: Tensor,
    projection_VH: Tensor,
    labels_N: Tensor,
    count: int,
    tp_group: dist.ProcessGroup | None = None,
    *,
    temperature: float = 1.0,
    among: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` likeliest ids, likeliest first, and log softmax(hidden · projectionᵀ / temperature) there.

    Memory beyond inputs and results: a chunk's logits, one fp32 buffer of that shape, and with ``among`` those columns.

    Args:
        hidden_NH: hidden states, any floating dtype; the same on all tensor-parallel ranks.
        projection_VH: the output projection, or this rank's rows of it.
        labels_N: int64, ids of the whole vocabulary.
        count: K.
        tp_group: the ranks that split the vocabulary.
        temperature: that the logits are divided by.
        among: int64, ascending: the ids to choose from, at least K; probabilities are over the whole vocabulary all the
            same. None: all.

    Returns:
        int64 [N, K]; fp32 or wider [N, K]; that of the label [N].
    """
    wide, vocab = wide_dtype(hidden_NH), len(projection_VH)
    ids = labels_N.new_empty(len(hidden_NH), count)
    log_p, label_log_p = (hidden_NH.new_empty(shape, dtype=wide) for shape in (ids.shape, labels_N.shape))
    first = 0 if tp_group is None else tp_group.rank() * vocab
    columns = None
    if among is not None:
        columns = among[(among >= first) & (among < first + vocab)] - first

    def read(rows: slice, logits_nV: Tensor, buffers: list[Tensor]) -> None:
        candidates = logits_nV if columns is None else logits_nV.index_select(1, columns)
        values, places = candidates.topk(min(count, candidates.shape[1]))
        places = (places if columns is None else columns[places]) + first
        if tp_group is not None and tp_group.size() > 1:
            values, places = _over_ranks(values, places, count, tp_group)
        ids[rows] = places
        asked = torch.cat([places, labels_N[rows].unsqueeze(-1)], -1)
        q = Distribution.of(logits_nV, buffers[0], asked, tp_group, temperature=temperature)
        log_p[rows], label_log_p[rows] = q.log_q_nK[:, :count], q.log_q_nK[:, count]

    over_chunks(hidden_NH, projection_VH, read, (False, False))
    return ids, log_p, label_log_p


def _over_ranks(values: Tensor, places: Tensor, count: int, tp_group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The likeliest of what each rank found among its own; ranks with fewer columns than ``count`` fill up."""
    lacking = count - values.shape[1]
    values = torch.nn.functional.pad(values, (0, lacking), value=-torch.inf)
    places = torch.nn.functional.pad(places, (0, lacking))
    every_value, every_place = ([torch.empty_like(x) for _ in range(tp_group.size())] for x in (values, places))
    dist.all_gather(every_value, values.contiguous(), group=tp_group)
    dist.all_gather(every_place, places.contiguous(), group=tp_group)
    values, at = torch.cat(every_value, -1).topk(count)
    return values, torch.cat(every_place, -1).gather(-1, at)
