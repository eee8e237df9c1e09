"""What a job is: a pure function from input objects and settings to the weights of its output object.

A job says which roles its inputs play, what its settings are (a pydantic model, filled from the job's TOML) and how to
compute the output: as a mapping of names to tensors not computed yet, so that the runner can stream them. It may write
what it wants to keep over an interruption into ``task.scratch``, and adds to ``task.report`` what the receipt is to
tell. Checking inputs, geometry, hashes, writing and exporting are the runner's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from megatron_vpmoe.config import RunConfig
from vpmoe.upcycle.registry import ObjectSpec
from vpmoe.weights import Weights
from vpmoe.weights.megatron_checkpoint import ITERATION


class JobSettings(BaseModel):
    """Settings that every job has; a job's own are fields of a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """Of the output's weights; "keep": as the job computes them. What the model keeps in fp32 stays so."""
    seed: int = 1234
    """Of whatever the job draws."""


Settings = TypeVar("Settings", bound=JobSettings)


@dataclass(frozen=True)
class Input:
    """An input object, checked.

    Attributes:
        spec: its entry.
        cfg: its geometry; None where a source declares none.
        content: its files' names, sizes and hashes.
        receipt: of a derived object.
    """

    spec: ObjectSpec
    cfg: RunConfig | None
    content: dict[str, dict[str, Any]]
    receipt: dict[str, Any] | None

    @property
    def hf(self) -> Path:
        """Its HF directory."""
        path = Path(self.spec.path)
        return path if self.spec.kind == "source" else path / "hf"

    @property
    def checkpoint(self) -> Path:
        """Its Megatron checkpoint; of a derived object."""
        assert self.spec.kind == "derived", f"{self.spec.id} is an HF directory"
        return Path(self.spec.path) / "megatron" / ITERATION


@dataclass(frozen=True)
class Task(Generic[Settings]):
    """One run of a job.

    Attributes:
        spec: the output object.
        cfg: its geometry.
        inputs: by role.
        settings: from the job's TOML.
        scratch: a directory that outlives an interruption and goes when the object is done.
        report: JSON-able; becomes the receipt's ``report``.
        progress: told (what, bytes) as work is done.
    """

    spec: ObjectSpec
    cfg: RunConfig
    inputs: Mapping[str, Input]
    settings: Settings
    scratch: Path
    progress: Callable[[str, int], None]
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Product:
    """What a job computes.

    Attributes:
        weights: every tensor of the output's geometry under Megatron's global names.
        run_state: see ``vpmoe.hf.convert.run_state``.
        assets: tokenizer files that go with the weights.
    """

    weights: Weights
    run_state: dict[str, Any]
    assets: list[Path]


class Job(Generic[Settings]):
    """Base of the jobs; stateless."""

    name: ClassVar[str]
    """As a job's TOML says it."""
    roles: ClassVar[tuple[str, ...]]
    """Inputs that it needs, by the name of the part they play; may be none."""
    settings_type: type[Settings]

    def decides(self, settings: Settings) -> dict[str, Any]:
        """What decides the output besides inputs, settings and geometry, JSON-able: goes into the object's key.

        Such as the hash of a file that the settings name.
        """
        return {}

    def convert(self, task: Task[Settings]) -> Product:
        """Compute the output; raises ``UpcycleError`` where the inputs cannot give it."""
        raise NotImplementedError

    def verify(self, task: Task[Settings], folder: Path) -> dict[str, Any]:
        """Hold the written object (``folder/megatron``, ``folder/hf``) to its promises; what was found.

        Raises:
            UpcycleError: a promise is not kept; there will be no object.
        """
        raise NotImplementedError
