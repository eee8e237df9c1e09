"""The o200k_base rank file: where it is looked for, how it is trusted, how it is put in place. Never the network.

The file is one line per token, ``base64(bytes) rank``. Its hash is checked each time it is read: a vocabulary that is
off by one line would train without any error and be worthless.
"""

from __future__ import annotations

import atexit
import gzip
import hashlib
import importlib.util
import shutil
import tempfile
from binascii import a2b_base64
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_vpmoe.files import write_atomically
from vpmoe.errors import TokenizerError

FILE_NAME = "o200k_base.tiktoken"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
RANK_COUNT = 199_998
DEFAULT_DIRECTORY = Path("data/tokenizer")
_INSTALL = f"run `vpmoe tokenizer install`, which places {DEFAULT_DIRECTORY / FILE_NAME} offline"


@dataclass(frozen=True)
class RankFile:
    """A rank file whose hash was found right.

    Attributes:
        content: the file's bytes, decompressed.
        path: where it lies on disk as a plain file; None if it came out of the bpe-openai package.
        source: the place it came from, for messages.
    """

    content: bytes
    path: Path | None
    source: str

    def ranks(self) -> dict[bytes, int]:
        """Bytes of each ordinary token -> its id, 199,998 of them."""
        return {a2b_base64(piece): int(rank) for piece, rank in map(bytes.split, self.content.splitlines())}


def find(configured: Path | None = None) -> RankFile:
    """The rank file at ``configured``, else in ``data/tokenizer/``, else out of the bpe-openai package.

    The first place that has a file decides: a damaged file is an error there and is not passed over for the next.

    Raises:
        TokenizerError: the configured path has no file, no place has one, or the file's hash is wrong.
    """
    if configured is not None:
        path = configured / FILE_NAME if configured.is_dir() else configured
        if not path.is_file():
            raise TokenizerError(f"no rank file at {path}", source="the configured tokenizer path", remedy=_INSTALL)
        return _checked(_plain(path), path, str(path))
    installed = DEFAULT_DIRECTORY / FILE_NAME
    if installed.is_file():
        return _checked(installed.read_bytes(), installed, str(installed))
    return from_package()


def from_package() -> RankFile:
    """The rank file that the PyPI package ``bpe-openai`` carries, decompressed.

    Raises:
        TokenizerError: the package is not installed, lacks the file, or carries another one.
    """
    # find_spec does not import the package, whose extension module is 74 MB.
    spec = importlib.util.find_spec("bpe_openai")
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        packed = Path(place) / "data" / f"{FILE_NAME}.gz"
        if packed.is_file():
            return _checked(_plain(packed), None, f"package bpe-openai, data/{packed.name}")
    raise TokenizerError(
        f"{FILE_NAME} was not found: not in {DEFAULT_DIRECTORY}/ and not in the package bpe-openai",
        source="installed packages" if places else "package bpe-openai is not installed",
        remedy="pip install bpe-openai, or pass the path of a rank file (--tokenizer-model)",
    )


def install(destination: Path = DEFAULT_DIRECTORY, *, configured: Path | None = None) -> Path:
    """Put the checked rank file into the folder ``destination``, atomically; a right file already there is kept.

    Returns:
        The path of the plain file.

    Raises:
        TokenizerError: no source has the right file, or another file lies there under its name.
    """
    target = destination / FILE_NAME
    found = None if configured is None else find(configured)
    if target.exists():
        _checked(target.read_bytes(), target, str(target))
        return target
    write_atomically(target, (found or from_package()).content)
    return target


@lru_cache(maxsize=1)
def plain_directory(configured: Path | None = None) -> Path:
    """A folder that holds the rank file under its own name, as TIKTOKEN_ENCODINGS_BASE wants it.

    Where only the packed file exists, it is unpacked into a temporary folder that lasts as long as the process.
    """
    found = find(configured)
    if found.path is not None and found.path.name == FILE_NAME:
        return found.path.parent.resolve()
    folder = Path(tempfile.mkdtemp(prefix="o200k_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / FILE_NAME).write_bytes(found.content)
    return folder


def _plain(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError) as error:
        raise TokenizerError(
            f"the packed rank file does not unpack: {error}", source=str(path), remedy=_INSTALL
        ) from error


def _checked(content: bytes, path: Path | None, source: str) -> RankFile:
    found = _sha256(content)
    if found != SHA256:
        raise TokenizerError(
            f"the rank file's sha256 is {found}, expected {SHA256}",
            source=source,
            remedy=f"move the file away and {_INSTALL}",
        )
    return RankFile(content, path, source)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
