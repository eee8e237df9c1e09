"""The objects of the ladder: which there are, of what geometry, made from what, and where they lie."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_vpmoe.config import RunConfig, load_config
from vpmoe.errors import UpcycleError

OBJECTS = Path("configs/upcycle/objects.toml")


class ObjectSpec(BaseModel):
    """One entry of objects.toml. Paths are relative to the working directory."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str
    """The entry's name."""
    kind: Literal["source", "derived"]
    """"source": an HF directory that somebody puts there; "derived": made by a job."""
    rung: int = Field(ge=0)
    """Rung of the ladder; 0 for what only feeds it."""
    path: str
    """Where it lies: an HF directory, or the directory with ``megatron/``, ``hf/`` and ``receipt.json``."""
    config: str | None = None
    """YAML of a run whose ``model`` and ``moe`` sections are the geometry; only a source may leave it out."""
    overrides: dict[str, Any] = {}
    """Fields that differ from ``config``, by name."""
    job: str | None = None
    """TOML of the job that makes it; of a derived object."""
    inputs: dict[str, str] = {}
    """What the job reads: role -> id; a job's ``roles`` say which, and where an HF directory will do, a derived object
    serves by its own."""
    origin: str | None = None
    """Where a source is published, for the message when it is missing."""
    revision: str | None = None
    """Published revision of a source; recorded in receipts."""
    partial: bool = False
    """Of a source: shards of its index may be missing, as only some tensors are read (a donor's embedding)."""
    sha256: dict[str, str] = {}
    """File name -> hex sha256 that a source has to have; files that are not named here are recorded, not checked."""


@dataclass(frozen=True)
class Registry:
    """All objects of one objects.toml."""

    path: Path
    objects: dict[str, ObjectSpec]

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
        """The derived objects that ``identifier`` needs, in the order of making them, itself last."""
        done: dict[str, ObjectSpec] = {}
        self._visit(identifier, (), done)
        return [spec for spec in done.values() if spec.kind == "derived"]

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


def load_registry(path: Path = OBJECTS) -> Registry:
    """Read objects.toml.

    Raises:
        UpcycleError: naming every unknown key, wrong type, missing field and unknown input at once.
    """
    table = read_toml(path)
    faults: list[str] = []
    objects: dict[str, ObjectSpec] = {}
    for identifier, entry in table.items():
        try:
            objects[identifier] = ObjectSpec.model_validate({"id": identifier, **entry})
        except (ValidationError, TypeError) as error:
            faults += [f"{identifier}.{text}" for text in describe(error)]
    for spec in objects.values():
        faults += [f"{spec.id}.{text}" for text in _contradictions(spec, table)]
    if faults:
        raise UpcycleError(
            f"{len(faults)} problems in the registry:\n    " + "\n    ".join(faults),
            source=str(path),
            remedy="correct the entries named above",
        )
    return Registry(path, objects)


def _contradictions(spec: ObjectSpec, table: dict[str, Any]) -> list[str]:
    faults = [f"inputs: there is no object {name!r}" for name in spec.inputs.values() if name not in table]
    if spec.kind == "derived":
        faults += [f"{key}: a derived object needs it" for key in ("job", "config") if getattr(spec, key) is None]
        if spec.sha256 or spec.revision or spec.origin:
            faults.append("sha256, revision, origin: of sources only; receipts hold those of a derived object")
    elif spec.job or spec.inputs:
        faults.append("job, inputs: of derived objects only")
    return faults


def geometry(spec: ObjectSpec) -> RunConfig | None:
    """The configuration whose sections ``model`` and ``moe`` are the object's; None where a source declares none.

    Raises:
        ConfigError: the YAML, or an override, is wrong.
    """
    if spec.config is None:
        return None
    return load_config(Path(spec.config), flags(spec.overrides))


def flags(overrides: Mapping[str, Any]) -> list[str]:
    """Fields by name as the words of a command line; TOML has no null, so the text "null" stands for it."""
    return [f"--{name.replace('_', '-')}={_text(value)}" for name, value in overrides.items()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a mapping; raises ``UpcycleError`` where it is missing or damaged."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UpcycleError(
            f"not a readable TOML file: {error}", source=str(path), remedy="name an existing file"
        ) from error


def describe(error: Exception) -> list[str]:
    """The findings of a validation error, one line each."""
    if isinstance(error, ValidationError):
        return [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
    return [str(error)]
