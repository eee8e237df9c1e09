"""What every configuration section shares: strictness, and the types of numbers, texts and lists with their bounds.

A bound is far above what anybody trains with; what lies beyond it is a slip that would hang, overflow or train nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

T = TypeVar("T")
BOUND = "bound"
"""The type of pydantic's finding where a value is of the right type and out of bounds; its message is a predicate."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, both included."""

    low: float
    high: float
    why: str
    """What a larger one would do."""

    def __call__(self, value: float) -> float:
        """The value; a pydantic finding of type ``BOUND`` where it lies outside."""
        if value < self.low:
            raise PydanticCustomError(BOUND, "must be at least {low}", {"low": self.low})
        if value > self.high:
            raise PydanticCustomError(BOUND, "must be at most {high}: {why}", {"high": self.high, "why": self.why})
        if value == 0 and math.copysign(1, value) < 0:
            raise PydanticCustomError(BOUND, "must be 0 without a sign")
        return value


def within(low: float, high: float, why: str) -> AfterValidator:
    """``Bounds`` as an annotation of a field's type."""
    return AfterValidator(Bounds(low, high, why))


def _is_text(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError(BOUND, "must not be blank")
    if len(value) > 4096 or not value.isprintable():
        raise PydanticCustomError(BOUND, "must be at most 4096 printable characters")
    return value


_TINY = 1e-30  # and its inverse: fp32 can divide by it
Count = Annotated[int, within(1, 10**9, "no run has that many")]
Cardinal = Annotated[int, within(0, 10**9, "no run has that many")]
Size = Annotated[int, within(1, 2**22, "no tensor's side or batch is that long")]
Few = Annotated[int, within(1, 1024, "every layer and process is planned one by one")]
Seed = Annotated[int, within(0, 2**32 - 1, "NumPy's generator takes no larger seed")]
Amount = Annotated[float, within(0, 1e4, "it weighs quantities of order 1")]
PositiveFloat = Annotated[float, within(_TINY, 1e12, "fp32 would keep nothing of what it is combined with")]
Fraction = Annotated[float, within(_TINY, 1, "it is small beside quantities of order 1")]
Rate = Annotated[float, within(_TINY, 10, "one step would replace the weights many times over")]
Decay = Annotated[float, within(0, 1 - 2**-24, "fp32 rounds it to 1, and nothing would ever be forgotten")]
Text = Annotated[str, AfterValidator(_is_text)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Several = Annotated[list[T], Field(max_length=256)]


class Section(BaseModel):
    """One section of a run's YAML: immutable, no unknown keys, no conversion of types (an int passes as a float)."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
