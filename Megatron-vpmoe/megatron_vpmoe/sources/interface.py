"""The interface between the loop and what it trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.objectives import Needs


class Position(NamedTuple):
    """Where a source stands between two steps: what a checkpoint keeps of it.

    Attributes:
        consumed_samples: rows of data that have gone into steps.
        data: whatever else it needs to go on, JSON-ready.
        arrays: what of it is large, by name; nothing changes them later.
    """

    consumed_samples: int
    data: Any
    arrays: Mapping[str, NDArray[Any]] = {}


class Step(NamedTuple):
    """What one optimizer step is made from.

    Attributes:
        batches: this rank's micro-batches, on the CPU; equally many on every rank.
        position: asked for when it is saved, that of the source after this step; the same on every rank. A collective
            that waits for what is under way then, and may be asked for once the next step is made.
        metrics: tag -> value; the same on every rank.
    """

    batches: list[Batch]
    position: Callable[[], Position]
    metrics: dict[str, float]


class Gives(Protocol):
    """What an objective may need of the batches that a source gives.

    Attributes:
        annotations: that every batch carries.
        depends_on_weights: batches come from the weights that are trained, as rollouts do. The loop asks for a step
            after the update before it; nothing may be made in advance.
    """

    @property
    def annotations(self) -> tuple[Annotation, ...]: ...
    @property
    def depends_on_weights(self) -> bool: ...


class Batches(Gives, Iterable[Batch], Protocol):
    """Batches to validate on, the same each time that they are iterated."""


class Source(Gives, Protocol):
    """Batches, step by step."""

    def next_step(self) -> Step:
        """The next step's micro-batches for this rank; every rank asks at the same time.

        Raises:
            DataError: there is something in the data that is not what it promises.
        """
        ...

    def resume(self, position: Position, *, source: str, allow_change: bool = False) -> list[str]:
        """Go on from where a checkpoint says that a source stood.

        Args:
            position: what a ``Step``'s gave; ``data`` as read from JSON, or [] from a checkpoint that has none.
            source: the checkpoint, for messages.
            allow_change: go on although what has been trained on was other data.

        Returns:
            lines for the log.

        Raises:
            CheckpointError: it is no position of this source.
        """
        ...

    def forget(self) -> None:
        """Drop what was made with weights that are no more; the next step is of data that come after. A collective."""
        ...

    def close(self) -> None:
        """End what it has running; a step made in advance is dropped."""
        ...


def check_needs(objective: str, needs: Needs, gives: Gives, *, source: str) -> None:
    """Refuse batches that lack what an objective needs, before any weight is allocated.

    Args:
        objective: its name, for messages.
        needs: the objective's.
        gives: a source, or what validates.
        source: where the batches come from, for messages.

    Raises:
        ConfigError: names everything that is missing.
    """
    given = {annotation.name: annotation for annotation in gives.annotations}
    missing = []
    for wanted in needs.annotations:
        found = given.get(wanted.name)
        if found is None:
            missing.append(f"the annotation {wanted.name!r}")
        elif wanted != found.model_copy(update={"width": wanted.width}) or (wanted.width or 0) > (found.width or 0):
            missing.append(f"the annotation {wanted.name!r} as {wanted}; it is {found}")
    if needs.depends_on_weights and not gives.depends_on_weights:
        missing.append("samples of the model that is trained; these are stored")
    if missing:
        raise ConfigError(
            f"the objective {objective} needs {'; '.join(missing)}",
            source=source,
            remedy="choose another objective (training.objective), or data that has it; training.reference_weights "
            "makes reference_log_p, training.teacher_weights or teacher_server what a teacher says. Of stored ones "
            "kd_top_k may be less, and kd_temperature is theirs",
        )
