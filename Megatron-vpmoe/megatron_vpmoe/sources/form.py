"""What sampled answers look like: Harmony or not, which token is of which span, how much is said again.

The strict parser of what a model writes is the sidecar's; this one owes nothing to a tokenizer and reads ids, by the
special tokens and the pieces of the dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.data.batch import Span
from megatron_vpmoe.data.pieces import TokenPieces
from megatron_vpmoe.errors import ConfigError, VpmoeError
from megatron_vpmoe.manifest import Manifest
from megatron_vpmoe.turns import MESSAGE_END, TURN_END

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_MARKS = ("<|start|>", "<|channel|>", "<|message|>", MESSAGE_END, TURN_END)
_SPANS = {b"analysis": Span.ANALYSIS, b"final": Span.FINAL}
_STRETCH = 4
"""Tokens of what counts as said again."""


class Seen(NamedTuple):
    """An answer of n tokens.

    Attributes:
        span_id: uint8 [n]; of each token, its message's header and end included, CONTEXT where there is no message of
            the assistant on a channel.
        valid: an analysis message, then a final one closed with ``<|return|>``, both with text in UTF-8, nothing else.
    """

    span_id: NDArray[np.uint8]
    valid: bool


class Form:
    """Reads answers in Harmony.

    Args:
        pieces: of the vocabulary.
        special: ids of its special tokens by spelling, the last ids that it has; those of messages are among them.
    """

    def __init__(self, pieces: TokenPieces, special: Mapping[str, int]) -> None:
        self._pieces, self._first_special = pieces, min(special.values())
        self._start, self._channel, self._message, self._end, self._return = (special[name] for name in _MARKS)

    @classmethod
    def of(cls, manifest: Manifest) -> Form | None:
        """Of a dataset; None where its vocabulary has no messages on channels."""
        special = manifest.tokenizer.special_tokens
        return cls(TokenPieces.load(manifest), special) if set(_MARKS) <= special.keys() else None

    def __call__(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Seen:
        """Read an answer; a prompt may end with the ``<|start|>assistant`` that begins it, or before."""
        prompt, answer = list(prompt_ids), list(answer_ids)
        last = next((n for n in reversed(range(len(prompt))) if prompt[n] >= self._first_special), len(prompt))
        opening = prompt[last:] if prompt[last : last + 1] == [self._start] else []
        ids = [*opening, *answer]
        special = [place for place, token in enumerate(ids) if token >= self._first_special]
        spans, order = np.zeros(len(ids), np.uint8), list[tuple[Span, int]]()
        position, sound = 0, True
        while position < len(ids) and sound:
            span, end, sound = self._message_at(ids, [place for place in special if place >= position][:4], position)
            spans[position:end] = span
            order.append((span, ids[end - 1]))
            position = end
        valid = sound and order == [(Span.ANALYSIS, self._end), (Span.FINAL, self._return)]
        return Seen(spans[len(opening) :], valid)

    def _message_at(self, ids: list[int], marks: list[int], position: int) -> tuple[Span, int, bool]:
        """The span of the message that begins at ``position``, where it ends, and whether nothing is wrong with it.

        Args:
            ids: of the answer.
            marks: places of the next four special tokens.
            position: where the message before ended.
        """
        kinds = [ids[place] for place in marks[:3]]
        if kinds != [self._start, self._channel, self._message] or marks[0] != position:
            return Span.CONTEXT, len(ids), False
        start, channel, message = marks[:3]
        span = _SPANS.get(self._bytes(ids[channel + 1 : message]))
        if span is None or self._bytes(ids[start + 1 : channel]) != b"assistant":
            return Span.CONTEXT, len(ids), False
        closed = marks[3] if len(marks) == 4 else len(ids)
        is_closed = closed < len(ids) and ids[closed] in (self._end, self._return)
        return span, min(closed + 1, len(ids)), is_closed and _is_text(self._bytes(ids[message + 1 : closed]))

    def _bytes(self, ids: list[int]) -> bytes:
        return self._pieces.decode_bytes(ids)


def _is_text(content: bytes) -> bool:
    try:
        return bool(content.decode().strip())
    except UnicodeDecodeError:
        return False


def repetition(ids: Sequence[int]) -> float:
    """The share of an answer's stretches of four tokens that it has had before; 0 of one with fewer tokens."""
    stretches = list(zip(*(ids[begin:] for begin in range(_STRETCH)), strict=False))
    return 1 - len(set(stretches)) / len(stretches) if stretches else 0.0


def check_collapse(metrics: Mapping[str, float], cfg: RunConfig) -> list[str]:
    """Hold what was sampled against the bounds ``rollouts.collapse_*``.

    Args:
        metrics: of a source; without those of a sampling nothing is held.
        cfg: the run's.

    Returns:
        a line for each bound that is passed, where ``collapse`` says to warn.

    Raises:
        VpmoeError: one is passed, and ``collapse`` says to stop.
    """
    passed = []
    for field, tag, sign in _BOUNDS:
        value, bound = metrics.get(f"rollout/{tag}"), getattr(cfg.rollouts, field)
        if None not in (value, bound) and sign * (value - bound) > 0:
            passed.append(f"rollout/{tag} = {value:.4g}, bound {bound:g} (rollouts.{field})")
    if passed and cfg.rollouts.collapse == "stop":
        raise VpmoeError(
            "the sampled answers collapse",
            source="; ".join(passed),
            remedy="go on from an earlier checkpoint with a lower lr or a larger opd_anchor_share, or move the bound",
        )
    return [f"the sampled answers collapse: {one}" for one in passed]


_BOUNDS = (
    ("collapse_length", "length_mean", 1),
    ("collapse_repetition", "repetition", 1),
    ("collapse_validity", "valid_share", -1),
)
"""Field, tag, and 1 where more is worse."""


def check_validity_can_be_told(manifest: Manifest, cfg: RunConfig) -> None:
    """Refuse ``collapse_validity`` where answers have no form that could be valid.

    Raises:
        ConfigError: the vocabulary has no messages on channels.
    """
    if cfg.rollouts.collapse_validity is not None and Form.of(manifest) is None:
        raise ConfigError(
            "validity is Harmony's, and the dataset's vocabulary has no messages on channels",
            source=f"rollouts.collapse_validity = {cfg.rollouts.collapse_validity:g}; {manifest.path}",
            remedy="set it to null",
        )
