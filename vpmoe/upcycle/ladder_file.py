"""A ladder's file: which objects there are, of what geometry, made from what by which job, and how they are asked."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from megatron_vpmoe.config import RunConfig, load_config, stored_faults
from megatron_vpmoe.config.schema_evaluation import AskedSuite
from megatron_vpmoe.config.schema_section import Count, Name, Size, Text
from megatron_vpmoe.errors import ConfigError
from vpmoe.errors import UpcycleError
from vpmoe.toml_file import read_toml

LADDER = Path("configs/upcycle/ladder.toml")
_Form = TypeVar("_Form", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ObjectSpec(_Section):
    """One table ``[objects.ID]``: made by its job; without one a source, an HF directory that somebody puts there.

    Paths are relative to the working directory.
    """

    id: str
    """The table's name."""
    rung: int = Field(ge=0)
    """Rung of the ladder; 0 for what only feeds it."""
    path: Text
    """Where it lies, ``folder``/ID if it does not say: an HF directory, or one with megatron/, hf/ and receipt.json."""
    config: Text | None = None
    """YAML of a run whose ``model`` and ``moe`` sections are the geometry. What has none has its input ``model``'s; a
    source needs none."""
    overrides: dict[str, Any] = {}
    """Fields that differ from ``config``, by name."""
    job: str | None = None
    """The job that makes it, by name."""
    settings: dict[str, Any] = {}
    """Of the job."""
    inputs: dict[str, str] = {}
    """What the job reads: role -> id; a job's ``roles`` say which, and where an HF directory will do, an object that a
    job made serves by its own."""
    origin: str | None = None
    """Where a source is published, for the message when it is missing."""
    revision: str | None = None
    """Published revision of a source; recorded in receipts."""
    partial: bool = False
    """Of a source: shards of its index may be missing, as only some tensors are read (a donor's embedding)."""
    sha256: dict[str, str] = {}
    """File name -> hex sha256 that a source has to have; files that are not named here are recorded, not checked."""

    @property
    def is_source(self) -> bool:
        """Nothing makes it."""
        return self.job is None


class Evaluation(_Section):
    """``[evaluation]``: what every rung is asked; paths are relative to the working directory."""

    texts: Path
    """Held-out texts, a file or folder as the builder of text datasets reads them."""
    text_field: str = "text"
    """Column of the text."""
    documents: Count
    """Texts read at most, from the first on."""
    characters: int = Field(ge=2)
    """Of each text, from its beginning: a length that does not depend on a vocabulary."""
    questions: Path
    """JSONL of held-out rows: ``query``, ``synthetic_answer``, and the family as ``exercise``."""
    per_family: Count
    """Questions of each family at most, from the first on."""
    max_new_tokens: Size
    """Of an answer; a longer one is cut."""
    conversation_tokens: Size | None = None
    """Of an answer to the same questions as Harmony conversations, which are asked of what conversations have taught;
    null: they are plain text at every rung."""
    batch_size: Size = 32
    """Texts or questions computed together; does not change what is found but for rounding."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the whole model is held in it."""
    suites: list[AskedSuite] = Field([], max_length=32)
    """Suites that every rung is asked besides (docs/eval_suite.md), as tables ``[[evaluation.suites]]``."""


class Ladder(_Section):
    """The whole file, read and checked."""

    folder: Text = "models"
    """Of the objects that name no path."""
    target: str | None = None
    """The last object: ``vpmoe ladder`` makes it and all that it is made from, in the order of making."""
    reports: Path = Path("reports/ladder")
    """Folder of the report and of every object's evaluation."""
    prepare: list[str] = []
    """Commands that ``vpmoe ladder`` gives first, such as those that build the datasets; each skips what is done."""
    evaluation: Evaluation | None = None
    objects: dict[Name, ObjectSpec] = Field(max_length=256)
    _path: Path = PrivateAttr(LADDER)

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._path

    def get(self, identifier: str) -> ObjectSpec:
        """The object of an id.

        Raises:
            UpcycleError: there is none.
        """
        if identifier not in self.objects:
            raise UpcycleError(
                f"no object {identifier!r}", source=str(self.path), remedy=f"one of {', '.join(self.objects)}"
            )
        return self.objects[identifier]

    def chain(self, identifier: str) -> list[ObjectSpec]:
        """The objects that jobs have to make for ``identifier``, in the order of making, itself last."""
        done: dict[str, ObjectSpec] = {}
        self._visit(identifier, (), done)
        return [spec for spec in done.values() if not spec.is_source]

    def _visit(self, identifier: str, above: tuple[str, ...], done: dict[str, ObjectSpec]) -> None:
        if identifier in above:
            raise UpcycleError(
                f"objects feed each other in a circle: {' <- '.join([*above, identifier])}",
                source=str(self.path),
                remedy="correct the inputs",
            )
        if identifier in done:
            return
        spec = self.get(identifier)
        for other in spec.inputs.values():
            self._visit(other, (*above, identifier), done)
        done[identifier] = spec


def read_ladder(path: Path = LADDER) -> Ladder:
    """Read a ladder's file.

    Raises:
        UpcycleError: no TOML, or naming every unknown key, wrong value, missing field and unknown input at once.
    """
    table = read_toml(path, error=UpcycleError)
    folder, objects = table.get("folder", "models"), table.get("objects")
    named: dict[str, Any] = objects if isinstance(objects, dict) else {}
    entries = {
        name: {"id": name, "path": f"{folder}/{name}", **entry} if isinstance(entry, dict) else entry
        for name, entry in named.items()
    }
    ladder, faults = _validated(Ladder, {**table, "objects": entries} if named else table)
    # What single entries got wrong does not hide what they say of each other.
    specs = {name: spec for name, entry in entries.items() if (spec := _validated(ObjectSpec, entry)[0])}
    faults += [f"objects.{spec.id}.{text}" for spec in specs.values() for text in _faults(spec, specs, named)]
    if (target := table.get("target")) not in (None, *named):
        faults.append(f"target: there is no object {target!r}")
    if ladder is not None and not faults:
        ladder.objects.update({name: _with_geometry(spec, specs) for name, spec in specs.items()})
        ladder._path = path
        return ladder
    raise UpcycleError(
        f"{len(faults)} problems in the ladder:\n    " + "\n    ".join(faults),
        source=str(path),
        remedy="correct the entries named above",
    )


def _validated(section: type[_Form], values: Any) -> tuple[_Form | None, list[str]]:
    try:
        return section.model_validate(values), []
    except ValidationError as error:
        return None, stored_faults(error)


def _faults(spec: ObjectSpec, objects: Mapping[str, ObjectSpec], named: Collection[str]) -> list[str]:
    """Of an entry beside the others: ``objects`` are those that are sound by themselves, ``named`` all."""
    faults = [f"inputs: there is no object {name!r}" for name in spec.inputs.values() if name not in named]
    if spec.is_source and (spec.inputs or spec.settings):
        faults.append("job: what has inputs or settings needs one")
    if not spec.is_source and (spec.sha256 or spec.revision or spec.origin or spec.partial):
        faults.append("sha256, revision, origin, partial: of sources only; receipts hold those of what a job made")
    if not spec.is_source and spec.config is None:
        if spec.overrides or "model" not in spec.inputs:
            faults.append("config: an object that a job makes needs it, unless its geometry is its input model's")
        elif len(objects) == len(named) and _with_geometry(spec, objects).config is None:
            faults.append(f"config: neither it nor its input {spec.inputs['model']} says one")
    return faults


def _with_geometry(spec: ObjectSpec, objects: Mapping[str, ObjectSpec]) -> ObjectSpec:
    """With the geometry of the input ``model`` where it has none of its own."""
    below, seen = spec, {spec.id}
    while below.config is None and (name := below.inputs.get("model", "")) in objects and name not in seen:
        below = objects[name]
        seen.add(name)
    return spec.model_copy(update={"config": below.config, "overrides": below.overrides})


def geometry(spec: ObjectSpec) -> RunConfig | None:
    """The configuration whose sections ``model`` and ``moe`` are the object's; None where a source declares none.

    Raises:
        ConfigError: the YAML, or an override, is wrong; or no job knows its type of layers.
    """
    if spec.config is None:
        return None
    cfg = load_config(Path(spec.config), flags(spec.overrides))
    if cfg.model.layer_type != "transformer":
        what = f"no job of the ladder makes or reads layers of type {cfg.model.layer_type}"
        raise ConfigError(what, source=f"{spec.id}: {spec.config}", remedy="set model.layer_type to transformer")
    return cfg


def flags(overrides: Mapping[str, Any]) -> list[str]:
    """Fields by name as the words of a command line; TOML has no null, so the text "null" stands for it."""
    return [f"--{name.replace('_', '-')}={_text(value)}" for name, value in overrides.items()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
