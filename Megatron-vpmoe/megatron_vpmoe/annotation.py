"""The declaration of an annotation: builder, manifest, reader, batch and verification rely on it alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Annotation(BaseModel):
    """The declaration of what every document carries beside its core, in a dataset and in batches.

    Attributes:
        name: in batches, file names and messages.
        dtype: one that torch and Megatron-Core's indexed datasets both have.
        per: "token": [L] of a document of L tokens, [b, s] of a batch; entry t describes token t+1, as the loss mask
            has it, and what describes a token past the document is dropped. "document": one value, [b, d] of a batch
            whose rows hold up to d documents; column n is the document of ``document_id`` n.
        width: K, for [L, K] and [b, s, K]; None for one entry a token.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    dtype: Literal["uint8", "int32", "int64", "float32"]
    per: Literal["token", "document"] = "token"
    width: Annotated[int, Field(ge=1, le=2**16)] | None = None

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if (self.width is not None and self.per == "document") or self.name in ("tokens", "lossmask", "span"):
            raise ValueError("a width is for what is annotated token by token, and a shard's parts are no annotations")
        return self

    def shape(self, length: int) -> tuple[int, ...]:
        """Of the array of a document of ``length`` tokens."""
        if self.per == "document":
            return ()
        return (length,) if self.width is None else (length, self.width)

    def entries(self, lengths: Any) -> Any:
        """Stored for documents of so many tokens; an integer array like ``lengths``."""
        return lengths * 0 + 1 if self.per == "document" else lengths * (self.width or 1)


REFERENCE_LOG_P = Annotation(name="reference_log_p", dtype="float32")
"""log p(label) under a frozen reference model where the loss mask holds, else 0."""
