"""No edit of a manifest passes unseen, and none that bears a right hash, however mad, is more than one error."""

import copy
import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from megatron_vpmoe import manifest as ground
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import NonFiniteError
from megatron_vpmoe.files import read_record, write_record
from tests.conftest import fuzz_settings
from vpmoe.data_curation.checks.stats import compare
from vpmoe.data_curation.checks.verify import verify
from vpmoe.data_curation.look.inspect import inspect
from vpmoe.data_curation.manifest import read_manifest
from vpmoe.errors import DataError, VpmoeError
from vpmoe.tokenizer import load_tokenizer

VALUES = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 2, 2**31, 2**53 - 1, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", "train", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "\u202e[bold]", "[/x]"]),
    st.sampled_from([[], {}, [[]], {"a": {}}]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield (*path, key)
        yield from places(below, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def edits(draw: st.DrawFn) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """One to three edits: a value replaced (by one of its own kind too), moved, taken away, or under another name."""
    edit = st.tuples(st.integers(0, 10**6), st.integers(0, 5), VALUES, st.integers(0, 10**6))
    wanted = draw(st.lists(edit, min_size=1, max_size=3))

    def edited(manifest: dict[str, Any]) -> dict[str, Any]:
        manifest = copy.deepcopy(manifest)
        for number, how, value, other in wanted:
            ways = list(places(manifest))
            *above, last = ways[number % len(ways)]
            parent = at(manifest, tuple(above))
            if how == 0:
                parent[last] = copy.deepcopy(value)
            elif how >= 4:  # of the same kind, so that the shape stays right
                same = [way for way in ways if type(at(manifest, way)) is type(parent[last])]
                parent[last] = copy.deepcopy(at(manifest, same[other % len(same)]))
            elif how == 1:
                parent[last] = copy.deepcopy(at(manifest, ways[other % len(ways)]))
            else:
                taken = parent.pop(last)
                if how == 3 and isinstance(parent, dict):
                    parent[value if isinstance(value, str) else repr(value)] = taken
        return manifest

    return edited


@pytest.fixture(scope="module")
def folders(dataset_dir: Path, conversations_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset and conversations whose manifests may be overwritten."""
    made = []
    for source in (dataset_dir, conversations_dir):
        folder = tmp_path_factory.mktemp("fuzzed") / "folder"
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "manifest.json").unlink()
        made.append(folder)
    return made[0], made[1]


@pytest.mark.parametrize("of_conversations", [False, True])
@fuzz_settings(150)
@given(edit=edits())
def test_no_edit_passes_unseen(
    of_conversations: bool, edit: Callable, folders: tuple[Path, Path], dataset_dir: Path, conversations_dir: Path
) -> None:
    whole = json.loads(((conversations_dir if of_conversations else dataset_dir) / "manifest.json").read_text())
    edited, folder = edit(whole), folders[of_conversations]
    (folder / "manifest.json").write_text(json.dumps(edited))
    if json.dumps(edited, sort_keys=True) == json.dumps(whole, sort_keys=True):
        read_manifest(folder)
        return
    for read in (read_manifest, ground.read_manifest):
        with pytest.raises(DataError):
            read(folder)


@pytest.mark.parametrize("of_conversations", [False, True])
@fuzz_settings(25)
@given(edit=edits())
def test_with_a_right_hash_it_is_faults_or_one_error(
    of_conversations: bool, edit: Callable, folders: tuple[Path, Path], dataset_dir: Path, conversations_dir: Path
) -> None:
    folder = folders[of_conversations]
    record = read_record((conversations_dir if of_conversations else dataset_dir) / "manifest.json")
    with suppress(NonFiniteError):  # nobody can write such a one
        write_record(folder / "manifest.json", edit(record))
    uses: list[Callable[[], object]] = [
        lambda: verify(folder, parsed_per_shard=1),
        lambda: inspect(folder, Console(file=io.StringIO()), count=1),
        lambda: compare(folder, dataset_dir, limit=5),
        lambda: load_tokenizer(folder),
        lambda: KDDataset.open(folder, "valid", seq_length=160, padded_vocab_size=512),
    ]
    for use in uses:
        try:
            use()
        except VpmoeError as error:
            assert error.source and "Traceback" not in str(error)
