"""The narrow formats that the routed experts' products can be made in, and what each asks of shapes and of a card.

Facts of torchao 0.18.0, ``prototype/moe_training``: its kernels' assertions on shapes, and the capabilities that its
tests run them on (the product itself is torch's ``_scaled_grouped_mm``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertFormat:
    """One of them."""

    block: int
    """Both widths of an expert are multiples of it: values that share a scale, or 16 bytes."""
    card_block: int
    """The same, of the kernels on a card."""
    rows: int
    """Each expert's rows are padded to a multiple of it, and to one such at least."""
    capability: tuple[int, int]
    """The compute capability that its kernels are written for."""
    packages: tuple[str, ...]
    """Beyond torchao, what its kernels need on a card."""

    def places(self, rows: int, experts: int) -> int:
        """Rows after padding, whatever experts they go to: at most so many, and so many are allocated."""
        return self.rows * (max(0, rows - 1) // self.rows + experts)


FORMATS: dict[str, ExpertFormat] = {
    "fp8_rowwise": ExpertFormat(16, 16, 16, (9, 0), ("triton",)),
    "mxfp8": ExpertFormat(32, 128, 128, (10, 0), ("triton", "cuda-bindings", "apache-tvm-ffi", "nvidia-cutlass-dsl")),
}
"""Name, as torchao's recipes have it -> format. Both are e4m3, with a scale that is a power of two: of a row
(``fp8_rowwise``), or of 32 values (``mxfp8``, OCP Microscaling 1.0)."""
