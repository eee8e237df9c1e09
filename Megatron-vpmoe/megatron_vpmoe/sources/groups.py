"""Sampled answers: how groups give advantages, how answers become documents in rows, how a checkpoint keeps them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.annotation import IS_SAMPLED, Annotation
from megatron_vpmoe.data.batch import Document, Span
from megatron_vpmoe.generation.prompts import Completion
from megatron_vpmoe.model.moe.replay import ROUTING, id_dtype
from megatron_vpmoe.objectives.grpo import ADVANTAGE, OLD, SAMPLED

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_OTHERS = (
    Annotation(name="untempered_log_p", dtype="float32"),
    ADVANTAGE,
    Annotation(name="reward", dtype="float32", per="document"),
    Annotation(name="group", dtype="int64", per="document"),
    Annotation(name="weight_version", dtype="int64", per="document"),
)
_LOG_P = ("sampled_log_p", "untempered_log_p", "old_log_p")
Advantage = Literal["std", "mean"]


@dataclass(frozen=True)
class Rollout:
    """One answer of a group; arrays of n answer tokens but for the prompt's.

    Attributes:
        group: number of the prompt in the order of the run.
        weight_version: steps after which its weights stood.
        finished: it ended by itself, not at the limit.
        reward: the weighted sum.
        advantage: within its group.
        routing: where it was recorded, of each token of prompt and answer but the last one [tokens - 1, layers with
            experts * K], as ``Completion`` has it; otherwise empty.
    """

    group: int
    weight_version: int
    finished: bool
    prompt_ids: NDArray[Any]
    ids: NDArray[Any]
    sampled_log_p: NDArray[Any]
    untempered_log_p: NDArray[Any]
    old_log_p: NDArray[Any]
    routing: NDArray[Any]
    reward: float = 0.0
    advantage: float = 0.0

    @classmethod
    def of(cls, completion: Completion, prompt_ids: Sequence[int], group: int) -> Self:
        """As sampled, before it is scored."""
        return cls(
            group=group,
            weight_version=completion.weight_version,
            finished=completion.finish == "stop",
            prompt_ids=np.asarray(prompt_ids, np.int32),
            ids=np.asarray(completion.ids, np.int32),
            sampled_log_p=np.asarray(completion.as_sampled, np.float32),
            untempered_log_p=np.asarray(completion.untempered, np.float32),
            old_log_p=np.zeros(len(completion.ids), np.float32),
            routing=np.concatenate(completion.routing or [np.zeros((0, 0), np.uint8)]),
        )

    @property
    def places(self) -> slice:
        """Positions whose label is an answer's token: the entries of its document's annotations."""
        return slice(len(self.prompt_ids) - 1, len(self.prompt_ids) - 1 + len(self.ids))

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.ids)

    def document(self, *, trained: bool = True, span_id: NDArray[np.uint8] | int = Span.FINAL) -> Document:
        """Prompt and answer, the answer supervised if it is to be trained on.

        Args:
            trained: whether it is.
            span_id: of the answer's tokens, [n] or one of all.
        """

        def placed(values: Any, dtype: Any) -> NDArray[Any]:
            array = np.zeros(len(self), dtype)
            array[self.places] = values
            return array

        of_document = {
            "advantage": np.asarray(self.advantage, np.float32),
            "reward": np.asarray(self.reward, np.float32),
            "group": np.asarray(self.group, np.int64),
            "weight_version": np.asarray(self.weight_version, np.int64),
            IS_SAMPLED.name: np.asarray(1, IS_SAMPLED.dtype),
        }
        tokens = {name: placed(getattr(self, name), np.float32) for name in _LOG_P}
        if len(self.routing):
            tokens[ROUTING] = np.pad(self.routing, ((0, 1), (0, 0)))
        return Document(
            tokens=np.concatenate([self.prompt_ids, self.ids]),
            loss_mask=placed(trained, np.uint8),
            span_id=placed(span_id if trained else Span.CONTEXT, np.uint8),
            annotations={**of_document, **tokens},
        )


def columns(rollouts: Sequence[Rollout]) -> dict[str, NDArray[Any]]:
    """One array of each attribute, which ``from_columns`` makes the same answers of: arrays are put end to end."""
    found = {}
    for field in fields(Rollout):
        values = [getattr(one, field.name) for one in rollouts]
        if isinstance(values[0], np.ndarray):
            found[f"{field.name}.lengths"] = np.asarray([len(value) for value in values])
            values = np.concatenate(values)
        found[field.name] = np.asarray(values)
    return found


def from_columns(found: Mapping[str, NDArray[Any]]) -> list[Rollout]:
    """The answers, whose arrays are stretches of those of ``found``."""
    parts = {}
    for field in fields(Rollout):
        column, lengths = found[field.name], found.get(f"{field.name}.lengths")
        parts[field.name] = column.tolist() if lengths is None else np.split(column, np.cumsum(lengths)[:-1])
    return [Rollout(**dict(zip(parts, each, strict=True))) for each in zip(*parts.values(), strict=True)]


def annotations_of(cfg: RunConfig) -> tuple[Annotation, ...]:
    """What an answer's document carries: with ``rollouts.router_replay`` also which experts its tokens went to."""
    sampled, old = (one.at(cfg.rollouts.rollout_temperature) for one in (SAMPLED, OLD))
    carried = (sampled, IS_SAMPLED) if cfg.training.objective == "on_policy" else (sampled, old, *_OTHERS)
    if cfg.rollouts.router_replay == "off":
        return carried
    layers = sum(cfg.is_moe_layer(number) for number in range(1, cfg.model.num_layers + 1))
    dtype, width = id_dtype(cfg.moe.num_experts or 0), layers * cfg.moe.moe_router_topk
    return (*carried, Annotation(name=ROUTING, dtype=dtype, width=width))


def with_advantages(group: Sequence[Rollout], kind: Advantage) -> list[Rollout]:
    """A = r - mean [/ (std + 1e-6)], with the sample's standard deviation (n - 1), in fp64."""
    rewards = [one.reward for one in group]
    mean = statistics.fmean(rewards)
    scale = 1.0 if kind == "mean" else statistics.stdev(rewards) + 1e-6
    # Of equal rewards a mean may be off by rounding: nothing is better than the others.
    return [replace(one, advantage=(one.reward - mean) / scale if varies(group) else 0.0) for one in group]


def varies(group: Sequence[Rollout]) -> bool:
    """Whether a group teaches anything: its rewards differ by more than the rounding of a weighted sum."""
    rewards = [one.reward for one in group]
    return not math.isclose(min(rewards), max(rewards), rel_tol=1e-9, abs_tol=1e-12)


def packed(lengths: Sequence[int], seq_length: int) -> list[list[int]]:
    """The places of answers by row: the longest first, each in the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        row = next((row for row, left in enumerate(room) if left >= lengths[place]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(seq_length)
        rows[row].append(place)
        room[row] -= lengths[place]
    return rows
