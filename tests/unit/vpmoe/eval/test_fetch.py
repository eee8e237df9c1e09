"""The public bundle over a real connection: whole, broken off, resumed, changed, refused."""

from __future__ import annotations

import hashlib
import io
import resource
import signal
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.tiny_core_bundle import TASKS, write_bundle
from vpmoe.errors import DataError, NotOursError
from vpmoe.eval.suites.bundle import Bundle
from vpmoe.eval.suites.fetch import Published, bundle_folder, fetch


class Server(HTTPServer):
    """Serves ``content``; breaks a connection off after ``breaks[0]`` bytes, the next after ``breaks[1]``, ..."""

    content, breaks, knows_ranges, status = b"", [], True, 200
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.knows_ranges else 0
        if self.server.status != 200 or begin >= len(self.server.content):
            self.send_error(416 if self.server.status == 200 else self.server.status)
            return
        rest = self.server.content[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.server.breaks.pop(0)] if self.server.breaks else rest)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder, packed = write_bundle(tmp_path / "source"), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(file for file in folder.rglob("*") if file.is_file()):
            archive.write(path, f"eval_bundle/{path.relative_to(folder)}")
        archive.writestr("__MACOSX/._core.yaml", "not ours")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content, server.breaks, server.asked = packed.getvalue(), [], []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def url_of(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/eval_bundle.zip"


def published(server: Server, folder: Path) -> Published:
    return Published(url=url_of(server), sha256=hashlib.sha256(server.content).hexdigest(), folder=folder)


def test_fetched_once_and_unpacked(server: Server, tmp_path: Path) -> None:
    said: list[str] = []
    target = published(server, tmp_path / "data" / "bundle")
    for _ in range(2):
        folder = bundle_folder(target, say=said.append)
    assert len(server.asked) == len(said) == 1
    bundle = Bundle(folder)
    assert [len(bundle.read(name)) for name in TASKS] == [12] * len(TASKS)
    assert not list(folder.parent.glob(".*.tmp")) and not list(folder.rglob("._*"))
    with pytest.raises(DataError, match="something else than the bundle"):
        bundle_folder(target.model_copy(update={"sha256": "0" * 64}), say=said.append)


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_goes_on_where_a_connection_broke(server: Server, tmp_path: Path, knows_ranges: bool) -> None:
    server.breaks, server.knows_ranges = [100, 700], knows_ranges
    target = published(server, tmp_path)
    fetch(target.url, target.sha256, tmp_path / "b.zip", waits=(0.0, 0.0, 0.0))
    assert (tmp_path / "b.zip").read_bytes() == server.content and not (tmp_path / "b.zip.part").exists()
    assert server.asked == [None, "bytes=100-", f"bytes={800 if knows_ranges else 700}-"]


def test_what_came_before_is_kept_for_another_command(server: Server, tmp_path: Path) -> None:
    server.breaks, target = [200], published(server, tmp_path)
    with pytest.raises(DataError, match="it ended after 200 bytes"):
        fetch(target.url, target.sha256, tmp_path / "b.zip", waits=())
    fetch(target.url, target.sha256, tmp_path / "b.zip", waits=())
    assert server.asked == [None, "bytes=200-"]
    (tmp_path / "c.zip.part").write_bytes(bytes(len(server.content) + 5))  # of a longer edition
    fetch(target.url, target.sha256, tmp_path / "c.zip", waits=())
    assert (tmp_path / "c.zip").read_bytes() == server.content


def test_the_wrong_bytes_are_refused_and_not_gone_on_with(server: Server, tmp_path: Path) -> None:
    target = published(server, tmp_path / "bundle")
    right, server.content = server.content, server.content[:-1] + b"?"
    with pytest.raises(DataError, match="the sha256 is"):
        bundle_folder(target, say=lambda line: None)
    assert not target.folder.exists()
    server.content = right
    assert bundle_folder(target, say=lambda line: None) == target.folder
    assert server.asked == [None, None]


def test_a_refusal_is_final_and_names_the_way_out(server: Server, tmp_path: Path) -> None:
    server.status, target = 404, published(server, tmp_path / "bundle")
    with pytest.raises(DataError, match="cannot be fetched: HTTP Error 404") as error:
        bundle_folder(target, say=lambda line: None)
    assert "--bundle" in str(error.value) and len(server.asked) == 1
    (tmp_path / "bundle.zip").write_bytes(b"mine")
    with pytest.raises((DataError, NotOursError), match="the sha256 is"):
        bundle_folder(target, say=lambda line: None)
    assert (tmp_path / "bundle.zip").read_bytes() == b"mine"


def test_a_full_disk_is_told_at_once(server: Server, tmp_path: Path) -> None:
    """It is no broken connection, which would be waited for; what was received stays."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    target = published(server, tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, former[1]))
        with pytest.raises(OSError, match="File too large") as error:
            fetch(target.url, target.sha256, tmp_path / "b.zip")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.filename == str(tmp_path / "b.zip.part") and len(server.asked) == 1
    fetch(target.url, target.sha256, tmp_path / "b.zip")
    assert (tmp_path / "b.zip").read_bytes() == server.content


def test_no_name_leads_out_of_the_folder(server: Server, tmp_path: Path) -> None:
    packed = io.BytesIO(server.content)
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("eval_bundle/../../escaped", "")
    server.content = packed.getvalue()
    with pytest.raises(DataError, match="no name of a file in its folder"):
        bundle_folder(published(server, tmp_path / "bundle"), say=lambda line: None)
    assert not (tmp_path / "bundle").exists() and not list(tmp_path.rglob("escaped"))
