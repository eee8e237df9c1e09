"""The rank file is found in one order, trusted only by its hash, and put in place whole."""

import gzip
from pathlib import Path

import pytest

from vpmoe.errors import TokenizerError
from vpmoe.tokenizer import rank_file


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_comes_from_the_package_when_nothing_is_installed() -> None:
    found = rank_file.find()
    assert found.path is None
    assert sorted(found.ranks().values()) == list(range(rank_file.RANK_COUNT))


def test_installed_file_comes_before_the_package() -> None:
    path = rank_file.install()
    assert path == Path("data/tokenizer/o200k_base.tiktoken")
    assert rank_file.find().path == path
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no temporary file is left"


def test_installing_again_keeps_the_right_file_and_does_not_replace_another() -> None:
    path = rank_file.install()
    before = path.stat().st_mtime_ns
    assert rank_file.install().stat().st_mtime_ns == before
    path.write_bytes(b"a user's own")
    with pytest.raises(TokenizerError, match="move the file away"):
        rank_file.install()
    assert path.read_bytes() == b"a user's own"


def test_a_damaged_file_is_refused_and_not_passed_over() -> None:
    path = rank_file.install()
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=rank_file.SHA256) as caught:
        rank_file.find()
    assert str(path) in str(caught.value) and "vpmoe tokenizer install" in str(caught.value)


def test_a_configured_path_may_be_file_folder_or_packed(tmp_path: Path) -> None:
    path = rank_file.install(tmp_path / "own")
    packed = tmp_path / "ranks.gz"
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    for configured in (path, path.parent, packed):
        assert rank_file.find(configured).content == path.read_bytes()


@pytest.mark.parametrize("content", [None, b"", b"not gzip"])
def test_a_configured_path_that_is_wrong_stops(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ranks.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"ranks\.gz"):
        rank_file.find(path)


def test_without_file_and_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match="pip install bpe-openai"):
        rank_file.find()


def test_plain_directory_holds_the_file_under_its_own_name() -> None:
    rank_file.plain_directory.cache_clear()
    assert (rank_file.plain_directory() / "o200k_base.tiktoken").is_file()
    rank_file.plain_directory.cache_clear()
