"""FlexAttention: one compiled GPU kernel for local and global layers, over the tiles that hold a visible pair.

Which tiles those are follows from the first key that each row sees, so a mask of all pairs is never built: torch's own
`create_block_mask` would make one. Within a tile the kernel asks `_visibility`, where the whole tile is visible it
does not. The sink joins afterwards by the log-sum-exp that the kernel returns, and its gradient flows back through it.

Torch's FlexAttention has no backward pass on the CPU, where it also computes densely; tests compare its values there.

Shapes: B batch, H query heads, G KV groups, S sequence, D head dim, N tiles of TILE rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.runtime import pulse

TILE = 128
# The compiled kernel takes no smaller head; zeros change neither scores nor, cut off again, values.
_SMALLEST_DIM = 16
_GRAPHS = 64


def flex_attention(
    q_BHSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    layout: SequenceLayout,
    window: int | None,
    alibi_slopes_H: Tensor | None,
    sink_H: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """As `backends.core_attention`."""
    mask = layout.shared(("flex", window), lambda: block_mask(layout, window))
    dim, run = q_BHSD.shape[-1], _compiled() if q_BHSD.is_cuda else _attend
    if filler := max(0, _SMALLEST_DIM - dim):
        q_BHSD, k_BGSD, v_BGSD = (torch.nn.functional.pad(x, (0, filler)) for x in (q_BHSD, k_BGSD, v_BGSD))
    return run(q_BHSD, k_BGSD, v_BGSD, mask, alibi_slopes_H, sink_H, softmax_scale)[..., :dim]


def _attend(
    q_BHSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask: flex.BlockMask,
    slopes_H: Tensor | None,
    sink_H: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    def with_distance(score: Tensor, _batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return score - slopes_H[head] * (row - column)  # type: ignore[index]

    out_BHSD, statistics = flex.flex_attention(
        q_BHSD,
        k_BGSD,
        v_BGSD,
        score_mod=None if slopes_H is None else with_distance,
        block_mask=mask,
        scale=softmax_scale,
        enable_gqa=True,
        return_aux=flex.AuxRequest(lse=True),
    )
    return out_BHSD if sink_H is None or statistics.lse is None else with_sink(out_BHSD, statistics.lse, sink_H)


def with_sink(out_BHSD: Tensor, lse_BHS: Tensor, sink_H: Tensor) -> Tensor:
    """out · sigmoid(lse - sink), in the dtype of ``out``: `sink.absorb_sink` where autograd takes the derivative."""
    return (out_BHSD * torch.sigmoid(lse_BHS - sink_H[:, None]).unsqueeze(-1)).to(out_BHSD.dtype)


@functools.cache
def _compiled(backend: object = "inductor") -> Callable[..., Tensor]:
    # Here and not at import: megatron.core is imported with a torch.compile that does nothing (runtime/device.py).
    # One graph or an error: past its limit of recompilations torch would otherwise compute densely, and not say so.
    # Windows, bias or not, gradients or not and the first two sequence lengths multiply: torch's limit of 8 is too low.
    pulse.compilations_are_signs()
    return torch.compile(_attend, backend=backend, fullgraph=True, recompile_limit=_GRAPHS)  # type: ignore[arg-type]


def block_mask(layout: SequenceLayout, window: int | None) -> flex.BlockMask:
    """Which tiles of TILE x TILE pairs the kernel visits, and which of them are visible throughout.

    Memory is O(B · (S + N²)). A row sees the keys from the first of its document, or of its window, up to itself; a
    tile of rows therefore visits a contiguous range of tiles that ends at its own.
    """
    first_key_BS, run_start_BS = _first_keys(layout.document_id, window)
    length = layout.length
    filler = -length % TILE
    first_key_BN = _tiles(first_key_BS, filler, length).amin(-1) // TILE
    last_run_BN = _tiles(run_start_BS, filler, length)[..., -1]

    tile = torch.arange((length + filler) // TILE, device=first_key_BS.device)
    row, column = tile[:, None], tile
    visited = (column >= first_key_BN[..., None]) & (column <= row)
    # Below the diagonal, all of one document, and even the farthest pair within the window.
    whole = (column < row) & (last_run_BN[..., None] <= column * TILE)
    if window is not None:
        whole &= (row - column + 1) * TILE <= window
    return flex.BlockMask.from_kv_blocks(
        *_listed(visited & ~whole),
        *_listed(whole),
        BLOCK_SIZE=TILE,
        mask_mod=_visibility(layout.document_id, window),
        seq_lengths=(length, length),
    )


def _first_keys(document_id_BS: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """[B, S]: the first row that each row may see; and where its run of equal document ids begins."""
    row = torch.arange(document_id_BS.shape[1], device=document_id_BS.device)
    changed = document_id_BS[:, 1:] != document_id_BS[:, :-1]
    starts = torch.nn.functional.pad(changed, (1, 0), value=True)
    run_start_BS = torch.where(starts, row, 0).cummax(dim=1).values
    # Padding alone may come in several runs, which see each other.
    padding = document_id_BS < 0
    first_padding_B1 = torch.where(padding, row, len(row)).amin(1, keepdim=True)
    first_BS = torch.where(padding, first_padding_B1, run_start_BS)
    return (first_BS if window is None else first_BS.maximum(row - window + 1)), run_start_BS


def _tiles(x_BS: Tensor, filler: int, value: int) -> Tensor:
    """[B, N, TILE]; ``value`` in the rows that fill up the last tile."""
    return torch.nn.functional.pad(x_BS, (0, filler), value=value).unflatten(1, (-1, TILE))


def _listed(chosen_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """BlockMask's form of a table of tiles: how many a row of tiles has [B, 1, N], and their columns, first [.., N]."""
    order = chosen_BNN.int().argsort(dim=-1, descending=True, stable=True)
    return chosen_BNN.sum(-1).int().unsqueeze(1), order.int().unsqueeze(1)


def _visibility(document_id_BS: Tensor, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def visible(batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = (document_id_BS[batch, row] == document_id_BS[batch, column]) & (row >= column)
        return seen if window is None else seen & (row - column < window)

    return visible
