"""Flat token files: what a dataset of text says in them, and the same dataset back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from conftest_dataset import tree
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import fuzz_settings
from tests.learned_vocabulary import write_vocabulary
from vpmoe.cli import main
from vpmoe.data_curation.checks.verify import verify
from vpmoe.data_curation.datasets import from_flat
from vpmoe.data_curation.datasets.flat_files import Flat, write_flat
from vpmoe.data_curation.datasets.from_flat import build_from_flat
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.datasets.sequential import Pass, build_sequential
from vpmoe.data_curation.datasets.text import HealingText
from vpmoe.data_curation.rows.source import resolve
from vpmoe.errors import DataError, NotOursError, TokenizerError
from vpmoe.tokenizer.hf_directory import HFDirectory

SEQ_LEN = 16
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"))


def dataset(folder: Path, vocabulary: Path, texts: list[str], extent: Pass | None = None) -> Path:
    """Of the texts, every fourth in the split valid."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "split": "train" if at % 4 else "valid"} for at, text in enumerate(texts, 1)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = BuildOptions(seq_len=SEQ_LEN, valid_fraction=0.0, tokenizer=vocabulary, split_field="split")
    source = resolve(str(folder / "rows.jsonl"))
    build_sequential(source, folder / "built", HealingText(base), extent or Pass(), quiet=True)
    return folder / "built"


@pytest.fixture(scope="module")
def built(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several shards."""
    texts = [" ".join(f"Mia {10 * n + k}" for k in range(1 + n % 9)) for n in range(40)]
    return dataset(tmp_path_factory.mktemp("text"), vocabulary, texts, Pass(shard_tokens=200))


@pytest.fixture(scope="module")
def flat(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flat") / "flat"
    assert main(["data", "to-flat", str(built), "--output-dir", str(folder)]) == 0
    return folder


@pytest.mark.slow
@fuzz_settings(20)
@given(texts=st.lists(TEXTS.filter(lambda text: not text.isspace()), min_size=4, max_size=12, unique=True))
def test_a_dataset_comes_back_as_it_was(vocabulary: Path, texts: list[str]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        built = dataset(folder / "a", vocabulary, ["zero", *texts])
        meta = write_flat(built, folder / "flat")
        tokenizer = HFDirectory(folder / "flat" / "tokenizer")
        for split, file in meta.files.items():
            ids = np.fromfile(folder / "flat" / file.name, "<u2")
            documents = np.split(ids, np.flatnonzero(ids == tokenizer.eod_id) + 1)[:-1]
            said = [tokenizer.decode(one[:-1].tolist()) for one in documents]
            manifest = json.loads((built / "manifest.json").read_text())
            assert len(said) == file.documents and len(ids) == file.tokens == manifest["splits"][split]["tokens"]
            assert set(said) <= {"zero", *texts}
        build_from_flat(folder / "flat", folder / "again", BuildOptions(seq_len=SEQ_LEN), quiet=True)
        for split in ("train", "valid"):
            assert tree(folder / "again" / split) == tree(built / split)


def test_what_a_reader_of_the_files_is_told(flat: Path, vocabulary: Path) -> None:
    meta, tokenizer = json.loads((flat / "meta.json").read_text()), HFDirectory(vocabulary)
    assert (meta["dtype"], meta["vocab_size"], meta["eod_id"]) == ("uint16", 320, tokenizer.eod_id)
    assert meta["special_tokens"] == tokenizer.special_tokens and meta["vocabulary"] == tokenizer.identity
    for split, name in (("train", "train.bin"), ("valid", "val.bin")):
        ids = np.memmap(flat / name, np.uint16, "r")
        told = meta["files"][split]
        assert told["name"] == name and told["tokens"] == len(ids) and ids[-1] == meta["eod_id"]
        assert told["documents"] == (ids == meta["eod_id"]).sum()
    assert {path.name for path in flat.iterdir()} == {"train.bin", "val.bin", "meta.json", "tokenizer", "receipt.json"}


def test_by_the_command_it_is_sound_and_trains_in_the_same_vocabulary(flat: Path, built: Path, tmp_path: Path) -> None:
    command = ["data", "from-flat", str(flat), "--output-dir", str(tmp_path / "again"), "--quiet"]
    assert main([*command, "--seq-len", str(SEQ_LEN), "--padded-vocab-size", "320"]) == 0
    assert verify(tmp_path / "again") == []
    first, second = (json.loads((folder / "manifest.json").read_text()) for folder in (built, tmp_path / "again"))
    for name in ("kind", "seq_length"):
        assert first[name] == second[name]
    assert second["tokenizer"]["padded_vocab_size"] == 320 and second["documents"]["kept"] == 40
    assert second["split_rule"] == {"rule": "train.bin is train, val.bin is valid"}
    assert main(["data", "to-flat", str(tmp_path / "again"), "--output-dir", str(flat)]) == 2  # not without --overwrite


def test_a_build_that_was_killed_ends_with_the_same_bytes(
    flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_flat, "Pass", lambda: Pass(shard_tokens=150))
    base = BuildOptions(seq_len=SEQ_LEN)
    build_from_flat(flat, tmp_path / "straight", base, quiet=True)
    assert len([*(tmp_path / "straight" / "train").glob("*_tokens.bin")]) > 2
    encoded, left = from_flat._OfFlat._encoded, [25]

    def dying(recipe: Any, split: Any, ids: np.ndarray) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return encoded(recipe, split, ids)

    monkeypatch.setattr(from_flat._OfFlat, "_encoded", dying)
    with pytest.raises(KeyboardInterrupt):
        build_from_flat(flat, tmp_path / "killed", base, quiet=True)
    build_from_flat(flat, tmp_path / "killed", base, quiet=True)
    assert tree(tmp_path / "killed") == tree(tmp_path / "straight")


def damage(name: str, change: Callable[[np.ndarray], np.ndarray], **told: Any) -> Callable[[Path], None]:
    """Other ids in a file, and a ``meta.json`` that agrees with its size and hash."""
    from megatron_vpmoe.files import file_entry

    def do(folder: Path) -> None:
        change(np.fromfile(folder / name, np.uint16)).astype(np.uint16).tofile(folder / name)
        meta = json.loads((folder / "meta.json").read_text())
        entry = next(file for file in meta["files"].values() if file["name"] == name)
        size = (folder / name).stat().st_size
        entry |= {**file_entry(folder / name), "tokens": size // 2, **told}
        (folder / "meta.json").write_text(json.dumps(meta))

    return do


def written(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no meta": (lambda folder: (folder / "meta.json").unlink(), "meta.json"),
    "another meta": (written("meta.json", '{"dtype": "int7"}'), "does not describe flat files: .*dtype"),
    "no file": (lambda folder: (folder / "val.bin").unlink(), "val.bin is missing"),
    "another content": (lambda folder: (folder / "val.bin").write_bytes(b"\0" * 8), "val.bin"),
    "an id beyond the vocabulary": (damage("train.bin", lambda ids: np.append(65_535, ids)), "id 65535 at 0 is none"),
    "no end": (damage("train.bin", lambda ids: ids[:-1]), "ends of documents"),
    "another count": (damage("val.bin", lambda ids: ids, documents=7), "7 are told"),
    "another size": (damage("val.bin", lambda ids: ids, tokens=7), "are not 7 ids of uint16"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_damage_is_named(what: str, flat: Path, tmp_path: Path) -> None:
    change, said = FAULTS[what]
    copy = shutil.copytree(flat, tmp_path / "flat")
    change(copy)
    with pytest.raises(DataError, match=said):
        build_from_flat(copy, tmp_path / "out", BuildOptions(seq_len=SEQ_LEN), quiet=True)


def test_another_vocabulary_and_conversations_are_refused(
    flat: Path, vocabulary: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    other = write_vocabulary(tmp_path / "other", 300)
    with pytest.raises(TokenizerError, match=r"the ids are of .*, and this vocabulary is"):
        build_from_flat(flat, tmp_path / "out", BuildOptions(tokenizer=other), quiet=True)
    with pytest.raises(DataError, match="of kind harmony_kd, whose loss mask"):
        write_flat(dataset_dir, tmp_path / "flat")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.bin").write_text("mine")
    built = dataset(tmp_path / "data", vocabulary, ["a fox", "a bear", "a ball"])
    with pytest.raises(NotOursError):
        write_flat(built, tmp_path / "mine", overwrite=True)


def test_ids_of_a_large_vocabulary_take_four_bytes(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"漢字 naïve {n}"}) + "\n" for n in range(5)))
    base = BuildOptions(seq_len=SEQ_LEN, valid_fraction=0.0)
    build_sequential(resolve(str(tmp_path / "rows.jsonl")), tmp_path / "a", HealingText(base), Pass(), quiet=True)
    meta = write_flat(tmp_path / "a", tmp_path / "flat")
    assert meta.dtype == "uint32" and meta.files["valid"].tokens == 0
    ids, ends = Flat(tmp_path / "flat").documents("train")
    assert ids.max() > 1 << 16 and len(ends) == 5
    build_from_flat(tmp_path / "flat", tmp_path / "b", base, quiet=True)
    assert tree(tmp_path / "a" / "train") == tree(tmp_path / "b" / "train")
