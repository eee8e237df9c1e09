"""Running a step: owned by one process, begun or gone on with, finished whole; the only code that removes outputs."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vpmoe.errors import DataError, NotOursError
from megatron_vpmoe.files import list_files, remove_folder, sync, write_record
from megatron_vpmoe.ownership import owned
from megatron_vpmoe.software import PACKAGES, provenance
from vpmoe.steps.receipt import RECEIPT, UNFINISHED, read_own, read_receipt
from vpmoe.steps.step import State, Step, changed, check_place, is_empty, some

Say = Callable[[str], None]
_SCRATCH = "scratch"


@dataclass
class Work:
    """A step at work.

    Attributes:
        folder: where its files go; all in it is ours.
        resumed: an interrupted run is gone on with.
        say: told a line about what is going on.
        results: of what is done of it, by name.
    """

    folder: Path
    key: Mapping[str, Any]
    resumed: bool
    say: Say
    results: dict[str, Any] = field(default_factory=dict)
    seconds_before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def scratch(self) -> Path:
        """A folder that outlives an interruption and goes when the step is finished; made on first use."""
        path = self.folder / _SCRATCH
        path.mkdir(exist_ok=True)
        return path

    def fresh(self, name: str) -> Path:
        """An empty folder of that name; what an interrupted attempt has left of it goes."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    @property
    def seconds(self) -> float:
        """Spent so far, interrupted runs of the same key included."""
        return self.seconds_before + time.monotonic() - self.started

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON-able result of a part of the work, which is done once over all interruptions."""
        if name in self.results:
            self.say(f"{name}: done before")
        else:
            result = make()
            self.results[name] = result
            self.save()
        return self.results[name]

    def save(self) -> None:
        """Keep ``results`` and the time spent."""
        state = {"key": self.key, "results": self.results, "seconds": round(self.seconds, 2)}
        write_record(self.folder / UNFINISHED, state)


def run(
    step: Step,
    make: Callable[[Work], Mapping[str, Any]],
    *,
    overwrite: bool = False,
    check_hashes: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Run a step unless it is done and valid; returns its receipt.

    Args:
        step: what to make.
        make: fills ``work.folder``, and returns the JSON-able report for the receipt; where it lists ``files`` (name ->
            bytes, sha256), these are the receipt's, otherwise all files of the folder are. ``origin``: what of
            :func:`megatron_vpmoe.software.provenance` the maker knows (config_hash, tokenizer, dataset).
        overwrite: replace finished work, and discard unfinished work, of another key.
        check_hashes: see :meth:`Step.state`.
        say: told a line about what is found, replaced and done.

    Raises:
        NotOursError: finished work of another key and no ``overwrite``; or something that no such step made.
        BusyError: another process is at this step.
        DataError: an input contains the output or lies in it; disk full or unwritable.
    """
    _check_apart(step)
    check_place(step.output)
    try:
        with owned(lock_of(step), str(step.output)) as former:
            if former is not None:
                say(f"going on after process {former.get('pid')} on {former.get('host')}, which ended abruptly")
            _settle(step)
            state = step.state(check_hashes=check_hashes)
            if state.due is None and state.receipt is not None:
                say(f"{step.output}: done and valid")
                return state.receipt
            _make_room(step, state, overwrite, say)
            work = _begin(step, say)
            try:
                report = dict(make(work))
            except BaseException:
                with contextlib.suppress(OSError):
                    work.save()
                raise
            return _finish(step, work, report)
    except OSError as error:
        raise DataError(
            f"{step.kind} cannot go on: {error.strerror or error}",
            source=str(error.filename or step.output),
            remedy="make room or mend the path, then give the same command again: it goes on from what is finished",
        ) from error


def lock_of(step: Step) -> Path:
    """The file that names who is at a step."""
    return step.output.with_name(f".{step.output.name}.lock")


def _check_apart(step: Step) -> None:
    output = Path(os.path.realpath(step.output))
    if step.output.name in ("", ".."):
        raise DataError("this cannot be made anew", source=str(step.output), remedy="name a folder of its own")
    for given in step.inputs:
        path = Path(os.path.realpath(given))
        if output.is_relative_to(path) or path.is_relative_to(output):
            raise DataError(
                f"input and output lie in one another: {given}",
                source=str(step.output),
                remedy="name an output outside of the input",
            )


def _settle(step: Step) -> None:
    """Bring the renames to their end between which a kill came."""
    former = _former(step)
    if step.in_place:
        return
    if (step.partial / RECEIPT).is_file() and not (step.partial / UNFINISHED).exists():
        read_receipt(step.partial)
        shutil.rmtree(step.partial / _SCRATCH, ignore_errors=True)
        _take_place(step)
    if former.exists():
        if step.output.exists():
            _remove(former)
        else:
            former.rename(step.output)


def _take_place(step: Step) -> None:
    """Rename the finished partial folder to the output; what it replaces goes last."""
    former = _former(step)
    if step.output.exists() and is_empty(step.output):
        _remove(step.output)
    if step.output.exists():
        step.output.rename(former)
    step.partial.rename(step.output)
    sync(step.output.parent)
    if former.exists():
        _remove(former)


def _remove(folder: Path) -> None:
    """Remove a folder of ours, the proof of that last: a removal that is interrupted can be brought to its end."""
    proofs = [folder / name for name in (RECEIPT, UNFINISHED)]
    if not is_empty(folder) and not any(proof.is_file() for proof in proofs):
        raise NotOursError("no receipt in it", source=str(folder), remedy="move it away")
    remove_folder(folder, proofs)


def _former(step: Step) -> Path:
    return step.output.with_name(f".{step.output.name}.replaced")


def _make_room(step: Step, state: State, overwrite: bool, say: Say) -> None:
    """Permit, announce or refuse what is in the way; finished work that is to give way stays until the end."""
    receipt, unfinished = state.receipt, step.unfinished_key()
    # A run directory of the same key that lost files is gone on with: nothing of it gives way.
    if receipt is not None and not (step.in_place and receipt["key"] == step.key):
        if not overwrite:
            raise NotOursError(
                f"finished work lies here, and {state.due}",
                source=str(step.output),
                remedy=f"{step.overwrite_flag} makes it again and replaces it; or name another output",
            )
        _check_all_made(step, receipt)
        say(f"replacing {step.output}: {len(receipt['files'])} files, finished {receipt.get('finished')} ({state.due})")
        if step.in_place:
            _remove(step.output)
    if unfinished is not None and unfinished != step.key:
        difference = changed(unfinished, step.key)
        if not overwrite and any(path.is_file() and path.name != UNFINISHED for path in step.partial.rglob("*")):
            raise NotOursError(
                f"unfinished work lies here, and {difference}",
                source=str(step.partial),
                remedy=f"set that back to go on with it; {step.overwrite_flag} discards it",
            )
        say(f"discarding the unfinished {step.partial} ({difference})")
        _remove(step.partial)


def _check_all_made(step: Step, receipt: Mapping[str, Any]) -> None:
    present = {path.relative_to(step.output).as_posix() for path in step.output.rglob("*") if path.is_file()}
    if not step.in_place and (foreign := sorted(present - {*receipt["files"], RECEIPT})):
        step.refuse(step.output, f"the step did not make {some(foreign)}")


def discard(step: Step, *, say: Say = lambda line: None) -> None:
    """Remove what a step of this kind has made at the output, finished or not, whatever its key; nothing else.

    Raises:
        NotOursError: something that no such step made.
        BusyError: another process is at this step.
    """
    with owned(lock_of(step), str(step.output)):
        _settle(step)
        unfinished = step.unfinished_key()
        receipt = None if step.in_place and unfinished is not None else step.receipt()
        if receipt is not None:
            _check_all_made(step, receipt)
        for folder, there in ((step.output, receipt), (step.partial, unfinished)):
            if there is not None and folder.exists():
                say(f"removing {folder}, to make it again")
                _remove(folder)


def _begin(step: Step, say: Say) -> Work:
    marker = step.partial / UNFINISHED
    if not marker.is_file():
        step.partial.mkdir(parents=True, exist_ok=True)
        work = Work(step.partial, step.key, False, say)
        work.save()
        return work
    if not step.in_place:  # what a kill left of files that were being written, in a folder that is all ours
        for leftover in step.partial.rglob(".*.tmp"):
            leftover.unlink()
    stored = read_own(marker)
    return Work(step.partial, step.key, True, say, stored["results"], float(stored["seconds"]))


def _finish(step: Step, work: Work, report: dict[str, Any]) -> dict[str, Any]:
    origin = report.pop("origin", {})
    files = report.pop("files", None) or list_files(work.folder, leave_out=(_SCRATCH, UNFINISHED, RECEIPT))
    receipt = {
        "key": step.key,
        "files": files,
        "report": report,
        "seconds": round(work.seconds, 2),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "provenance": provenance(**origin, packages=(*PACKAGES, *step.packages)),
    }
    for name in files:
        sync(work.folder / name)
    write_record(work.folder / RECEIPT, receipt)
    (work.folder / UNFINISHED).unlink()
    sync(work.folder)
    # Last: killed before its receipt is whole, the step is run again, and finds here what it has done.
    shutil.rmtree(work.folder / _SCRATCH, ignore_errors=True)
    if not step.in_place:
        _take_place(step)
    return read_receipt(step.output)
