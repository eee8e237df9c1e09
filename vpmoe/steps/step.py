"""One keyed step: what decides its result, and whether it is due and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from megatron_vpmoe.errors import DataError, NotOursError
from megatron_vpmoe.files import first_damage, place_of
from megatron_vpmoe.software import package_versions
from vpmoe import __version__
from vpmoe.steps.receipt import RECEIPT, UNFINISHED, changes, read_own, read_receipt

_NAMED = 5


@dataclass(frozen=True)
class State:
    """How a step stands.

    Attributes:
        due: why it has to be run; None: it is done and valid.
        receipt: of what lies there, whether it is of this key or not; None where there is no sound one.
        unfinished: an interrupted run of the same key will be gone on with.
    """

    due: str | None
    receipt: dict[str, Any] | None = None
    unfinished: bool = False


@dataclass(frozen=True)
class Step:
    """What makes one folder.

    Attributes:
        kind: what it makes, such as ``dataset``; a folder is replaced only by a step of the same kind.
        version: of the code that makes it; raised whenever the same inputs would give another result.
        output: the folder.
        decides: everything else that decides the result, JSON-able: options, hashes of inputs. Nothing operational.
        packages: distributions whose version decides the result too.
        inputs: folders and files that are read; none may contain the output or lie in it.
        in_place: the folder is worked in under its own name, as a training run is; what it then holds is all ours.
        overwrite_flag: how a user asks for finished work to be replaced.
    """

    kind: str
    version: int
    output: Path
    decides: Mapping[str, Any]
    packages: tuple[str, ...] = ()
    inputs: tuple[Path, ...] = ()
    in_place: bool = False
    overwrite_flag: str = "--overwrite"

    @cached_property
    def key(self) -> dict[str, Any]:
        """What decides the result, as JSON reads it back."""
        own = {
            "kind": self.kind,
            "version": self.version,
            "code": __version__,
            "packages": package_versions(self.packages),
        }
        assert not own.keys() & self.decides.keys(), f"these are the engine's: {own.keys() & self.decides.keys()}"
        return json.loads(json.dumps({**own, **self.decides}))

    @property
    def partial(self) -> Path:
        """Where the work goes on until it is finished."""
        return self.output if self.in_place else self.output.with_name(f"{self.output.name}.partial")

    def state(self, *, check_hashes: bool = False) -> State:
        """Hold receipt and files against the key; reads only.

        Args:
            check_hashes: compare the files' contents too, not only names and sizes.

        Raises:
            NotOursError: something that no step of this kind made lies there.
        """
        unfinished = self.unfinished_key()
        if self.in_place and unfinished is not None:
            due = "it was interrupted" if unfinished == self.key else changed(unfinished, self.key)
            return State(due, unfinished=unfinished == self.key)
        receipt = self.receipt()
        if receipt is None:
            interrupted = unfinished == self.key
            return State("it was interrupted" if interrupted else "not made yet", unfinished=interrupted)
        due = changed(receipt["key"], self.key) or first_damage(
            self.output, receipt["files"], check_hashes=check_hashes
        )
        return State(due, receipt, unfinished=unfinished == self.key)

    def receipt(self) -> dict[str, Any] | None:
        """What is on record of the output; None where there is nothing, or an empty folder."""
        if not _exists(self.output) or is_empty(self.output):
            return None
        if not self.output.is_dir() or self.output.is_symlink():
            self.refuse(self.output, "it is not a folder")
        if not (self.output / RECEIPT).is_file():
            names = sorted(path.name for path in self.output.iterdir())
            self.refuse(self.output, f"it has no {RECEIPT}, and holds {some(names)}")
        receipt = read_receipt(self.output)
        if receipt["key"].get("kind") != self.kind:
            self.refuse(self.output, f"it is {receipt['key'].get('kind')!r}")
        return receipt

    def unfinished_key(self) -> dict[str, Any] | None:
        """The key of the work that lies unfinished in ``partial``; None where none does."""
        path = self.partial / UNFINISHED
        if not path.is_file():
            if not self.in_place and _exists(self.partial) and not is_empty(self.partial):
                self.refuse(self.partial, f"it has no {UNFINISHED}")
            return None
        key = read_own(path)["key"]
        if key.get("kind") != self.kind:
            self.refuse(self.partial, f"its {UNFINISHED} is of another step")
        return key

    def refuse(self, folder: Path, reason: str) -> NoReturn:
        """Raise :class:`NotOursError` for something in the way that is not this step's."""
        raise NotOursError(
            f"here lies something that was not made as {self.kind!r}: {reason}",
            source=str(folder),
            remedy="move it away, or name another output; it is not replaced even when asked",
        )


def check_place(output: Path) -> None:
    """Refuse an output that cannot be made where it is named, before anything is read for it.

    Raises:
        DataError: a file lies above it, or the folder that it would come into cannot be written.
    """
    above, reason = place_of(output.absolute().parent)
    if reason is not None:
        raise DataError(
            f"this {reason}, so nothing can be made below it",
            source=str(above),
            remedy=f"name another output than {output}, or mend the path",
        )


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Which fields two keys do not share, in a line; None where they are the same."""
    found = changes(old, new)
    return f"it was made under another key: {some(found, '; ')}" if found else None


def is_empty(folder: Path) -> bool:
    """A folder that holds nothing, or only the beginning of a marker that was never written."""
    begun = f".{UNFINISHED}."
    return folder.is_dir() and all(path.name.startswith(begun) and path.suffix == ".tmp" for path in folder.iterdir())


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def some(names: list[str], separator: str = ", ") -> str:
    """The first few of a list."""
    more = f"{separator}and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return separator.join(names[:_NAMED]) + more
