"""The public bundle, fetched once: what came before a connection broke is kept; only the right hash is unpacked."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field

from megatron_vpmoe.errors import visible
from megatron_vpmoe.files import inside, move_into_place, naming, read_record, sha256_of_file, sync, write_record
from megatron_vpmoe.ownership import owned
from vpmoe.data_curation.rows.hub import RETRY_SECONDS
from vpmoe.errors import DataError
from vpmoe.eval.suites.bundle import TASKS
from vpmoe.progress import Progress

ORIGIN = "fetched.json"
_PIECE, _TIMEOUT_SECONDS = 1 << 20, 60
_PARTIAL_CONTENT, _NO_SUCH_RANGE = 206, 416


class Published(BaseModel):
    """Where a zip of the bundle is published, and the folder that it is unpacked to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(pattern="^https?://")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    folder: Path


def bundle_folder(published: Published, *, say: Callable[[str], None] | None) -> Path:
    """The folder of the bundle; fetched and unpacked where it is not there yet.

    Args:
        published: the bundle.
        say: told that it is fetched; None: it has to be there.

    Raises:
        DataError: it cannot be fetched, or is not what was published, or is not there.
        NotOursError, BusyError: something else lies at the folder, or somebody is at it.
    """
    folder = published.folder
    origin = folder / ORIGIN
    if folder.exists():
        if origin.is_file() and read_record(origin).get("archive_sha256") == published.sha256:
            return folder
        raise DataError(
            f"here lies something else than the bundle of sha256 {published.sha256}",
            source=str(folder),
            remedy="name it with --bundle if it is the bundle to use; or move it away",
        )
    if say is None:
        raise DataError(
            "the CORE bundle is not there",
            source=str(folder),
            remedy="vpmoe eval core8 fetches it; or name the folder of another one as bundle",
        )
    with owned(folder.with_name(f".{folder.name}.lock"), "the bundle"):
        if not folder.exists():  # another process may have been at it
            archive = folder.with_name(f"{folder.name}.zip")
            say(f"fetching {published.url}")
            fetch(published.url, published.sha256, archive)
            _unpack(archive, folder, published)
    return folder


def fetch(url: str, sha256: str, path: Path, *, waits: tuple[float, ...] = RETRY_SECONDS) -> None:
    """Bring a file to ``path``, going on from what an earlier attempt has left in ``path.part``.

    Args:
        url: of http or https; the server may or may not know ranges.
        sha256: that the whole has to have.
        path: a whole file that lies there already is held to the hash.
        waits: seconds between attempts that bring nothing.

    Raises:
        DataError: the server refuses, the connection fails for good, or the hash is another.
        OSError: the disk does not take it; what it took stays.
    """
    part = path if path.exists() else path.with_name(path.name + ".part")
    if part is not path:
        path.parent.mkdir(parents=True, exist_ok=True)
        _receive(url, part, waits)
    if (found := sha256_of_file(part)) != sha256:
        if part is not path:
            part.unlink()  # what was received is wrong from an unknown place on
        raise DataError(
            f"the sha256 is {found}, expected {sha256}",
            source=str(path) if part is path else url,
            remedy="move the file away" if part is path else "try again; if it stays so, what is published has changed",
        )
    if part is not path:
        move_into_place(part, path)


def _receive(url: str, part: Path, waits: tuple[float, ...]) -> None:
    attempt = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _is_whole_after(url, part, before):
                return
            failure: Exception = HTTPException(f"it ended after {part.stat().st_size:,} bytes")
        except urllib.error.HTTPError as error:
            if error.code == _NO_SUCH_RANGE and before:
                part.unlink()  # longer than the file: of an earlier edition
                continue
            if error.code < 500:
                raise _failed(url, error) from error
            failure = error
        except HTTPException as error:
            failure = error
        arrived = part.exists() and part.stat().st_size > before
        attempt = 0 if arrived else attempt + 1
        if attempt >= len(waits):
            raise _failed(url, failure) from failure
        time.sleep(waits[attempt])


def _is_whole_after(url: str, part: Path, before: int) -> bool:
    """Receive the rest behind the first ``before`` bytes, or all anew; False: the connection ended early."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={before}-"} if before else {})
    with _connection():
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    with answer:
        if before and answer.status != _PARTIAL_CONTENT:
            before = 0
        length = answer.headers.get("Content-Length")
        expected = None if length is None else before + int(length)
        with (
            naming(part),
            part.open("ab" if before else "wb") as stream,
            Progress("fetching", expected, unit="MB", scale=1e6, done_before=before) as progress,
        ):
            while piece := _piece(answer):
                stream.write(piece)
                progress.add(len(piece))
    return expected is None or part.stat().st_size == expected


def _piece(answer: HTTPResponse) -> bytes:
    with _connection():
        return answer.read(_PIECE)


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    """What fails here is the connection, which may come back; other errors of the system are the disk's."""
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except OSError as error:
        raise HTTPException(str(error)) from error


def _failed(url: str, error: Exception) -> DataError:
    return DataError(
        visible(f"it cannot be fetched: {error}"),
        source=url,
        remedy="give the same command again, it goes on where it stopped; or unpack it yourself and name it: --bundle",
    )


def _unpack(archive: Path, folder: Path, published: Published) -> None:
    """Unpack the folder in which ``core.yaml`` lies, beside ``folder``, and give it its name when all is there."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as packed:
            names = [name for name in packed.namelist() if not name.endswith("/")]
            found = sorted((name for name in names if PurePosixPath(name).name == TASKS), key=len)
            top = found[0].removesuffix(TASKS) if found else None
            if top is None:
                raise DataError(f"there is no {TASKS} in it", source=str(archive), remedy="name another bundle")
            for name in (name for name in names if name.startswith(top)):
                target = inside(temporary, name.removeprefix(top))
                target.parent.mkdir(parents=True, exist_ok=True)
                with packed.open(name) as source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream)
                sync(target)
        write_record(temporary / ORIGIN, {"url": published.url, "archive_sha256": published.sha256})
        temporary.rename(folder)
        sync(folder.parent)
    except zipfile.BadZipFile as error:
        raise DataError(f"this is no zip: {error}", source=str(archive), remedy="move it away") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
