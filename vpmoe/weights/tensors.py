"""Tensors that are read when asked for, their hashes, and the check that a set of them is what a model needs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_vpmoe.files import sha256_of_json
from megatron_vpmoe.runtime.finite import require_finite
from vpmoe.errors import WeightsError

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""As settings spell them; "keep" leaves each tensor's own."""
_SHOWN = 6


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known and whose values are computed or read on each call of ``load``.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        load: gives it, on the CPU; may be called more than once and gives equal values each time.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """A tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The values, contiguous.

        Raises:
            WeightsError: ``load`` gave another shape or dtype than it declared.
        """
        tensor = self.load()
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise WeightsError(
                f"a tensor declared as {self.dtype} {list(self.shape)} is {tensor.dtype} {list(tensor.shape)}",
                remedy="the conversion that declares it is wrong; report it",
            )
        return tensor.detach().contiguous()

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same values in another dtype."""
        return self if dtype == self.dtype else replace(self, dtype=dtype, load=lambda: self.load().to(dtype))

    def finite(self, name: str, source: str) -> LazyTensor:
        """The same values, held to be finite whenever they are read: what every reader of files gives."""
        return replace(self, load=lambda: require_finite(self.load(), name, source=source))


Weights = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class LogitDifference:
    """How far two models' logits are apart.

    Attributes:
        largest: absolute, over all positions and words.
        scale: largest absolute logit of the first model.
        prompts: lengths, in tokens.
    """

    largest: float
    scale: float
    prompts: list[int]

    @classmethod
    def between(cls, before: Sequence[Tensor], after: Sequence[Tensor]) -> LogitDifference:
        """Of two models' fp32 logits [length, vocabulary] of the same prompts; raises :class:`NonFiniteError`."""
        for name, logits in (("before", before), ("after", after)):
            for values in logits:
                require_finite(values, f"the logits {name}")
        return cls(
            largest=max(float((new - old).abs().max()) for old, new in zip(before, after, strict=True)),
            scale=max(float(old.abs().max()) for old in before),
            prompts=[len(old) for old in before],
        )

    def fault(self, tolerance: float) -> str | None:
        """How far, if more than ``tolerance``, which is relative to the largest logit where that is above 1."""
        bound = tolerance * max(1.0, self.scale)
        return None if self.largest <= bound else f"{self.largest:.2e} (allowed {bound:.2e})"

    def as_json(self) -> dict[str, Any]:
        """For a receipt."""
        return {"logit_difference": self.largest, "logit_scale": self.scale, "prompts": self.prompts}


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """One prompt of random tokens of each length; a pure function of its arguments."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def padded_with_mean(rows: Tensor, of: Tensor, count: int) -> Tensor:
    """``rows`` with the mean row of ``of`` for all from theirs up to ``count``: its logit is then the mean logit."""
    mean = of.double().mean(dim=0).to(rows.dtype)
    return torch.cat([rows, mean.expand(count - rows.shape[0], -1)])


def padded(table: LazyTensor, rows: int) -> LazyTensor:
    """An embedding with mean rows up to ``rows``."""
    if rows == table.shape[0]:
        return table

    def load() -> Tensor:
        known = table.read()
        return padded_with_mean(known, known, rows)

    return LazyTensor((rows, *table.shape[1:]), table.dtype, load)


def part(whole: LazyTensor, rows: int, take: Callable[[Tensor], Tensor]) -> LazyTensor:
    """``rows`` rows of a tensor, which ``take`` takes."""
    return LazyTensor((rows, *whole.shape[1:]), whole.dtype, lambda: take(whole.read()))


def cut(table: LazyTensor, rows: int) -> LazyTensor:
    """The inverse of ``padded``."""
    return table if rows == table.shape[0] else part(table, rows, lambda whole: whole[:rows])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def tensor_sha256(tensor: Tensor) -> str:
    """Hex sha256 of dtype, shape and values."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def weights_sha256(hashes: Mapping[str, str]) -> str:
    """One hash for a set of named tensors, whatever files they lie in.

    Args:
        hashes: name -> ``tensor_sha256``.
    """
    return sha256_of_json(dict(hashes))


def check_geometry(weights: Weights, expected: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Hold names and shapes against what a model of the declared geometry has.

    Raises:
        WeightsError: naming the tensors that are missing, surplus or of another shape.
    """
    faults = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in weights]
    faults += [f"surplus: {name} {list(tensor.shape)}" for name, tensor in weights.items() if name not in expected]
    faults += [
        f"{name}: {list(weights[name].shape)}, the geometry says {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != tuple(shape)
    ]
    if faults:
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise WeightsError(
            f"{len(faults)} tensors disagree with the declared geometry:\n    "
            + "\n    ".join([*faults[:_SHOWN], *more]),
            source=source,
            remedy="correct the geometry in the configuration, or name the weights that have it",
        )
