"""What a job is: a pure function from input objects and settings to the weights of its output object.

A job says which roles its inputs play, what its settings are (a pydantic model, filled from the object's entry) and how
to compute the output: as a mapping of names to tensors not computed yet, so that the runner can stream them. It may
write what it wants to keep over an interruption into ``task.scratch``, and adds to ``task.report`` what the receipt is
to tell. Checking inputs, geometry, hashes, writing and exporting are the runner's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.config.schema_section import Seed
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.inputs import Input
from vpmoe.upcycle.ladder_file import ObjectSpec
from vpmoe.weights import Weights


class JobSettings(BaseModel):
    """Settings that every job has; a job's own are fields of a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """Of the output's weights; "keep": as the job computes them. What the model keeps in fp32 stays so."""


class DrawingSettings(JobSettings):
    """Settings of a job that draws: prompts to compare two models on, noise, the order of batches."""

    seed: Seed = 1234
    """Of all that."""


Settings = TypeVar("Settings", bound=JobSettings)


@dataclass(frozen=True)
class Task(Generic[Settings]):
    """One run of a job.

    Attributes:
        spec: the output object.
        cfg: its geometry.
        inputs: by role.
        settings: from the object's entry.
        scratch: a directory that outlives an interruption and goes when the object is done.
        progress: told (what, bytes) as work is done.
        report: JSON-able; becomes the receipt's ``conversion``.
    """

    spec: ObjectSpec
    cfg: RunConfig
    inputs: Mapping[str, Input]
    settings: Settings
    scratch: Path
    progress: Callable[[str, int], None]
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def rows_read(self) -> dict[str, int]:
        """Rows of each dataset, by its documents' hash, that the trainings up to the input model have read."""
        below = self.inputs.get("model") or self.inputs.get("source")
        return below.receipt["report"].get("rows_read", {}) if below and below.receipt else {}


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
    """As an object's entry says it."""
    version: ClassVar[int] = 1
    """Raised whenever the same inputs and settings would give another object: objects of older versions are stale."""
    packages: ClassVar[tuple[str, ...]] = ("torch", "megatron-core", "transformers", "safetensors", "numpy")
    """Distributions that compute the weights or what the receipt says of them."""
    roles: ClassVar[tuple[str, ...]]
    """Inputs that it needs, by the name of the part they play; may be none."""
    optional_roles: ClassVar[tuple[str, ...]] = ()
    """Inputs that it reads where they are declared."""
    settings_type: type[Settings]

    def decides(self, spec: ObjectSpec, settings: Settings) -> dict[str, Any]:
        """What decides the output besides code, inputs and geometry, JSON-able: goes into the object's key.

        Such as the hash of a file that the settings name.
        """
        return {"settings": settings.model_dump(mode="json")}

    def convert(self, task: Task[Settings]) -> Product:
        """Compute the output; raises ``UpcycleError`` where the inputs cannot give it."""
        raise NotImplementedError

    def verify(self, task: Task[Settings], folder: Path) -> dict[str, Any]:
        """Hold the written object (``folder/megatron``, ``folder/hf``) to its promises; what was found.

        Raises:
            UpcycleError: a promise is not kept; there will be no object.
        """
        raise NotImplementedError


_JOBS = {
    "vocabulary": "vpmoe.upcycle.vocabulary:Vocabulary",
    "depth": "vpmoe.upcycle.depth:Depth",
    "experts": "vpmoe.upcycle.experts:Experts",
    "morph": "vpmoe.upcycle.morph:Morph",
    "shape": "vpmoe.upcycle.shape:Shape",
    "import_qwen3": "vpmoe.upcycle.import_qwen3:ImportQwen3",
    "pretrain": "vpmoe.upcycle.training_jobs:Pretrain",
    "heal": "vpmoe.upcycle.training_jobs:Heal",
}


def job_of(name: str, *, source: str) -> Job:
    """The job of a name, whose module is imported now; raises ``UpcycleError`` where there is none."""
    if name not in _JOBS:
        raise UpcycleError(f"no job {name!r}", source=source, remedy=f"one of {', '.join(_JOBS)}")
    module, attribute = _JOBS[name].split(":")
    return getattr(importlib.import_module(module), attribute)()
