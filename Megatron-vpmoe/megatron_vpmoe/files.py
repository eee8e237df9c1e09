"""Files that are either whole or absent, their hashes, and JSON read with care; what both packages write and read by.

Lines of JSON are split at the line feed alone: other characters that end a line for ``str.splitlines`` (U+2028) stand
in texts. A process that is killed can leave a last line without its end; it is no line yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_vpmoe.errors import DataError, NonFiniteError, VpmoeError

RECEIPT = "receipt.json"
"""In a folder that a keyed step made: a record (:func:`write_record`) of its files, with their hashes."""
Tell = Callable[[int], object]
_PIECE_BYTES = 1 << 20
_HASHING_THREADS = 8
DEEPEST = 100
"""Levels of a document: far below what Python can recurse into; deeper ones could be read, and then not walked."""
_ESCAPED = "backslashreplace"  # what UTF-8 has no bytes for (a file's name that is not UTF-8): as JSON escapes it


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name ``path`` in what the system says of an open file: of a full disk it names none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds either its former content or all of the new one, even after a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def move_into_place(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its final name, durably."""
    sync(temporary)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(path)
    sync(path.parent)


def remove_folder(folder: Path, proofs: Collection[Path]) -> None:
    """Remove a folder whose files ``proofs`` say whose it is, those last, and so the receipts of folders in it: an
    interrupted removal can be ended.
    """
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            remove_folder(path, [path / RECEIPT])
        elif path not in proofs:
            path.unlink()
    for proof in proofs:
        proof.unlink(missing_ok=True)
    folder.rmdir()


def sync(path: Path) -> None:
    """Make a file's content durable, or the names in a folder: a rename is only on disk once its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path, tell: Tell | None = None) -> str:
    """Hex sha256 of a file of any size; ``tell`` is told the bytes of each piece that is read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
            if tell is not None:
                tell(len(piece))
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex sha256 of a JSON value in its canonical spelling (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors=_ESCAPED)).hexdigest()


def json_bytes(value: Any) -> bytes:
    """A JSON document for people and machines: two-space indent, key order kept, a final newline.

    Raises:
        NonFiniteError: a number in it is nan or infinite, which no JSON is and no receipt may hold; names its place.
    """
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(errors=_ESCAPED)
    except ValueError as cause:
        found = next(f"{place} is {number}" for place, number in _numbers(value) if not math.isfinite(number))
        raise NonFiniteError(found, remedy="what it was computed from is damaged or has diverged") from cause


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(item, f"{place}.{key}" if place else str(key))


def json_line(value: Any) -> str:
    """A value as one line of JSON, ASCII alone, with its line feed."""
    return json.dumps(value) + "\n"


def read_json(path: Path, *, error: type[VpmoeError] = DataError, remedy: str = "make it again") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error: unreadable, not JSON, nested too deep, or no object; names the file and ``remedy``.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise error(f"{path.name} cannot be read: {reason}", source=str(path), remedy=remedy) from cause
    if not isinstance(value, dict):
        raise error(f"{path.name} holds {type(value).__name__}, not an object", source=str(path), remedy=remedy)
    if at_depth(value):
        raise error(f"{path.name} is nested deeper than {DEEPEST} levels", source=str(path), remedy=remedy)
    return value


def at_depth(value: Any) -> list[Any]:
    """What lies ``DEEPEST`` levels of lists and objects below a JSON value; found without recursion."""
    level = [value]
    for _ in range(DEEPEST):
        branches = (
            held.values() if isinstance(held, dict) else held for held in level if isinstance(held, dict | list)
        )
        level = [item for branch in branches for item in branch]
    return level


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object together with ``sha256``, the hash of all else in it."""
    plain = json.loads(json.dumps(record))
    write_atomically(path, json_bytes({**plain, "sha256": sha256_of_json(plain)}))


def read_record(path: Path, *, error: type[VpmoeError] = DataError, remedy: str = "make it again") -> dict[str, Any]:
    """What :func:`write_record` wrote, without its ``sha256``.

    Raises:
        error: as :func:`read_json`; or it was edited: its hash is another, or missing.
    """
    return unsealed(read_json(path, error=error, remedy=remedy), path, error=error, remedy=remedy)


def unsealed(
    record: dict[str, Any], path: Path, *, error: type[VpmoeError] = DataError, remedy: str = "make it again"
) -> dict[str, Any]:
    """:func:`read_record` of what has been read from ``path`` already; takes ``sha256`` out of it."""
    if (stated := record.pop("sha256", None)) != sha256_of_json(record):
        fault = "has no hash of itself" if stated is None else "was edited: its hash is another"
        raise error(f"{path.name} {fault}", source=str(path), remedy=remedy)
    return record


def place_of(path: Path) -> tuple[Path, str | None]:
    """What is there at ``path`` or the nearest above it, and why nothing can be made in it; None: it can."""
    place = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        return place, "is no folder"
    return place, None if os.access(place, os.W_OK | os.X_OK) else "cannot be written to"


def inside(folder: Path, name: str) -> Path:
    """The path of a file below ``folder`` whose name comes out of a file: a manifest, a receipt, an index.

    Raises:
        DataError: the name leads out of the folder, or is none.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise DataError(
            f"{name!r} is no name of a file in its folder",
            source=str(folder),
            remedy="nothing of ours writes such a name: do not use what comes with it",
        )
    return folder.joinpath(*parts)


def read_json_lines(path: Path, *, ours: bool = True) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of each line that is not blank.

    Args:
        path: the file.
        ours: a log that we write: a last line without its line feed, as a kill leaves it, is left out. False: a file of
            a user's, whose last line counts however it ends.

    Raises:
        DataError: a line is not JSON, or the file cannot be read; names file and line.
    """
    try:
        with path.open("rb") as stream:
            yield from parse_json_lines(stream, str(path), ours=ours)
    except OSError as cause:
        raise DataError(f"cannot be read: {cause.strerror}", source=str(path), remedy="name a readable file") from cause


def parse_json_lines(lines: Iterable[bytes], source: str, *, ours: bool = True) -> Iterator[tuple[int, Any]]:
    """:func:`read_json_lines` of lines that come from elsewhere, such as a decompressor; ``source`` is for messages."""
    for number, line in enumerate(lines, start=1):
        if line.isspace() or (ours and not line.endswith(b"\n")):
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as cause:
            raise DataError(
                f"line {number} is not JSON: {cause}", source=f"{source}:{number}", remedy="mend or remove the line"
            ) from cause
        yield number, value


def file_entry(path: Path, tell: Tell | None = None) -> dict[str, Any]:
    """``{"bytes", "sha256"}`` of a file; ``tell`` as for :func:`sha256_of_file`."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path, tell)}


def list_files(folder: Path, *, leave_out: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Path relative to ``folder`` -> ``file_entry`` of every file below it, those under ``leave_out`` left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [file for file in files if file.relative_to(folder).parts[0] not in leave_out]
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, _hashes(files), strict=True)
    }


def _hashes(files: Sequence[Path], tell: Tell | None = None) -> Iterator[str]:
    """``sha256_of_file`` of each, several at a time unless somebody is told."""
    if tell is not None or len(files) < 2:
        yield from (sha256_of_file(file, tell) for file in files)
        return
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1, _HASHING_THREADS)) as threads:
        yield from threads.map(sha256_of_file, files)


def first_damage(
    folder: Path, files: Mapping[str, Mapping[str, Any]], *, check_hashes: bool, tell: Tell | None = None
) -> str | None:
    """The first file that is not as it was listed; None if all are. Names and sizes come before contents.

    Args:
        files: from ``list_files``, or with ``sha256`` alone.
        check_hashes: compare contents, not only names and sizes.
        tell: as for :func:`sha256_of_file`.
    """
    paths: dict[str, Path] = {}
    for name, expected in files.items():
        try:
            file = paths[name] = inside(folder, name)
        except DataError as error:
            return error.what
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected.get("bytes", file.stat().st_size):
            return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
    for name, digest in zip(paths, _hashes(list(paths.values()), tell), strict=True) if check_hashes else ():
        if digest != files[name]["sha256"]:
            return f"{name} does not have the sha256 that was written"
    return None
