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
            whose rows hold up to d documents; column n is the document of ``document_id`` n. "record": of files alone,
            a record of ``width`` entries a supervised position, or none of the whole document.
        width: K, for [L, K] and [b, s, K]; None for one entry a token.
        temperature: of log-probabilities: that the logits were divided by.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    dtype: Literal["uint8", "int16", "int32", "int64", "float32"]
    per: Literal["token", "document", "record"] = "token"
    width: Annotated[int, Field(ge=1, le=2**22)] | None = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False, exclude_if=lambda value: value == 1)] = 1.0

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

    def at(self, temperature: float) -> Self:
        """The same of logits that are divided by ``temperature``."""
        return self.model_copy(update={"temperature": temperature})

    def may_have(self, entries: Any, lengths: Any) -> Any:
        """Whether documents of so many tokens may have so many entries stored; a bool array like ``lengths``."""
        if self.per == "record":
            return (entries % (self.width or 1) == 0) & (entries <= lengths * (self.width or 1))
        return entries == (lengths * 0 + 1 if self.per == "document" else lengths * (self.width or 1))


IS_SAMPLED = Annotation(name="is_sampled", dtype="uint8", per="document")
"""1 of an answer of the model that is trained, 0 of a stored conversation beside answers."""

REFERENCE_LOG_P = Annotation(name="reference_log_p", dtype="float32")
"""log p(label) under a frozen reference model where the loss mask holds, else 0."""

TEACHER_IDS = Annotation(name="teacher_ids", dtype="int32")
"""The K likeliest successors of a token in a teacher's eyes, likeliest first and none twice, or K times NO_RECORD: it
was not asked there. Of any width; with it come TEACHER_LOG_P of the same width and TEACHER_LABEL_LOG_P."""
TEACHER_LOG_P = Annotation(name="teacher_log_p", dtype="float32")
"""log p of each of TEACHER_IDS over the teacher's whole vocabulary, so that what they leave of 1 is the tail's; 0 where
there is no record. Its temperature says that of the teacher's softmax."""
TEACHER_LABEL_LOG_P = Annotation(name="teacher_label_log_p", dtype="float32")
"""The same of the token that follows, whether or not it is among TEACHER_IDS."""


def of_teacher(count: int, temperature: float) -> tuple[Annotation, Annotation, Annotation]:
    """TEACHER_IDS, TEACHER_LOG_P and TEACHER_LABEL_LOG_P of ``count`` ids, of logits divided by ``temperature``."""
    width = {"width": count}
    of_ids = TEACHER_IDS.model_copy(update=width), TEACHER_LOG_P.at(temperature).model_copy(update=width)
    return *of_ids, TEACHER_LABEL_LOG_P.at(temperature)


NO_RECORD = -1
FILLING_LOG_P = -100.0
"""Of an id that only fills a record up to K: it is no outcome of its own, and belongs to the tail."""
