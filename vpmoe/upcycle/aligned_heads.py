"""Where the calibrated attention starts: heads are aligned before they become one.

Rotations of a head's frequency pairs commute with RoPE and keep a norm, so a group's keys may be rotated if its queries
are too; values may be mapped linearly if the output projection undoes it. Consecutive groups become one: keys and
queries are the mean over groups turned to agree, frequency by frequency; values are the strongest directions of all
groups' values together, and the output projection reads each group's from them. Groups that are copies of each other up
to such rotations (and any invertible map of the values) are merged without loss where the norm's weights are equal
within a frequency pair.

Shapes: H heads, G groups, D head dim, C hidden, N tokens, J groups that become one; complex [D / 2] holds the pairs
(x_j, x_{j + D/2}) that RoPE turns.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def merged_heads(
    query_HDC: Tensor,
    key_GDC: Tensor,
    value_GDC: Tensor,
    projection: Tensor,
    inputs: Iterable[Tensor],
    new: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fewer heads and groups.

    Args:
        query_HDC: rows of the query projection.
        key_GDC: of the keys'.
        value_GDC: of the values'.
        projection: of the output [C, H D].
        inputs: normed hidden states [N, C], batch by batch.
        new: numbers of heads and groups; divisors of H and G.

    Returns:
        the four matrices in the same layouts, fp32.
    """
    heads, groups = new
    second_moment = _second_moment(inputs)  # [C, C]
    dim, together = key_GDC.shape[1], key_GDC.shape[0] // groups
    per_group = query_HDC.shape[0] // key_GDC.shape[0]
    query = query_HDC.double().unflatten(0, (groups, together, per_group))
    key = key_GDC.double().unflatten(0, (groups, together))
    value = value_GDC.double().unflatten(0, (groups, together))
    output = projection.double().unflatten(1, (groups, together, per_group, dim))

    phase_GJF = torch.stack([_phases(group, second_moment) for group in key])
    key = _turned(key, phase_GJF).mean(1)
    query = _turned(query, phase_GJF[:, :, None]).flatten(0, 2).unflatten(0, (heads, -1)).mean(1)
    values, outputs = [], []
    for index in range(groups):
        basis = _strongest(value[index].flatten(0, 1), second_moment, dim)  # [J D, D], orthonormal columns
        values.append(basis.t() @ value[index].flatten(0, 1))
        outputs.append(torch.einsum("cjpd,jde->cjpe", output[:, index], basis.unflatten(0, (together, dim))))
    merged = torch.stack(outputs, 1).flatten(1, 3).unflatten(1, (heads, -1)).sum(2).flatten(1)
    return query.float(), key.float(), torch.stack(values).float(), merged.float()


def _second_moment(inputs: Iterable[Tensor]) -> Tensor:
    """fp64 [C, C]: sum of x xᵀ."""
    total: Tensor | None = None
    for x in inputs:
        part = x.double().t() @ x.double()
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _phases(key_JDC: Tensor, second_moment: Tensor) -> Tensor:
    """Complex [J, D / 2] of modulus 1: by what each group's keys are turned so that they agree with all groups'.

    Of the groups' correlations at a frequency, E[k_a conj(k_b)], the leading eigenvector says how far each is turned.
    """
    pairs = _complex(key_JDC)  # [J, D / 2, C]
    correlation = torch.einsum("afc,cd,bfd->fab", pairs, second_moment.to(pairs.dtype), pairs.conj())
    leading = torch.linalg.eigh(correlation).eigenvectors[..., -1]  # [D / 2, J]
    leading = leading * leading[:, :1].conj()  # the first group stays as it is
    size = leading.abs()
    unit = torch.where(size > 1e-12, leading / size.clamp_min(1e-12), torch.ones_like(leading))
    return unit.conj().t()


def _turned(rows: Tensor, phase: Tensor) -> Tensor:
    """[..., D, C] with every frequency pair multiplied by its phase [..., D / 2]."""
    turned = _complex(rows) * phase[..., None]
    return torch.cat([turned.real, turned.imag], -2)


def _complex(rows: Tensor) -> Tensor:
    """[..., D, C] -> complex [..., D / 2, C]."""
    return torch.complex(*rows.chunk(2, -2))


def _strongest(rows: Tensor, second_moment: Tensor, count: int) -> Tensor:
    """Orthonormal [rows, count]: the directions in which the outputs of a matrix [rows, C] have the most power."""
    return torch.linalg.eigh(rows @ second_moment @ rows.t()).eigenvectors[:, -count:]
