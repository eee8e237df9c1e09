"""Annotating a dataset ahead of time: the same bytes whenever it was killed; nothing of what there was is touched."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.batch import Document
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import DataError, NonFiniteError, NotOursError
from megatron_vpmoe.manifest import read_manifest
from vpmoe.cli import main
from vpmoe.data_curation.checks.verify import verify
from vpmoe.steps import RECEIPT
from vpmoe.teacher import annotate as module
from vpmoe.teacher.annotate import Annotating

IDS = Annotation(name="teacher_ids", dtype="int32", width=2)
SCORE = Annotation(name="reward", dtype="float32", per="document")


class Killed(BaseException):
    """What no one answers."""


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 60 conversations in several shards."""
    folder = tmp_path_factory.mktemp("chats")
    rows = "".join(f'{{"prompt": "What is {n}?", "completion": "{n * n}"}}\n' for n in range(60))
    (folder / "rows.jsonl").write_text(rows)
    options = ["--seq-len", "64", "--valid-fraction", "0.2", "--shard-tokens", "800", "--quiet"]
    paths = ["--input", str(folder / "rows.jsonl"), "--output-dir", str(folder / "chats")]
    assert main(["data", "build-chat", *paths, *options]) == 0
    return folder / "chats"


def scorer(stop_after: int | None = None, spoilt: float = 0.0) -> Any:
    """Annotations by the documents alone, three a batch, until it is killed."""
    scored = 0

    def score(documents: Iterable[Document]) -> Iterator[list[dict[str, Any]]]:
        nonlocal scored
        batch: list[dict[str, Any]] = []
        for document in documents:
            if scored == stop_after:
                raise Killed
            ids = np.stack([document.tokens, -document.tokens], axis=1)
            batch.append({"teacher_ids": ids, "reward": np.float32(document.tokens.sum() + spoilt)})
            scored += 1
            if len(batch) == 3:
                yield batch
                batch = []
        if batch:
            yield batch

    return score


def annotating(dataset: Path, score: Any, by: str = "one") -> Annotating:
    return Annotating(
        read_manifest(dataset), (IDS, SCORE), {"weights": by}, {"name": "test"}, lambda: nullcontext(score)
    )


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECEIPT)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
def test_killed_anywhere_it_is_the_same_dataset(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, said = tree(chats), []
    dataset = annotating(chats, scorer()).make(tmp_path / "whole", quiet=True, say=said.append)
    assert dataset.annotations == (IDS, SCORE) and dataset.sha256 != read_manifest(chats).sha256
    for split, entry in dataset.splits.items():
        assert entry.rows
        opened = KDDataset(dataset, split, seq_length=64)
        for row in range(len(opened)):
            document = opened[row]
            assert np.array_equal(document.annotations["teacher_ids"][:, 1], -document.tokens)
            assert document.annotations["reward"] == document.tokens.sum()
    assert verify(tmp_path / "whole") == [] and tree(chats) == before
    assert main(["data", "inspect", str(tmp_path / "whole"), "--count", "0"]) == 0
    assert "teacher_ids, reward by test" in capsys.readouterr().out

    monkeypatch.setattr(module, "_SAVE_SECONDS", 0.0)  # each batch is kept
    for stop in (0, 7, 8, 20):
        with pytest.raises(Killed):
            annotating(chats, scorer(stop)).make(tmp_path / "killed", quiet=True, say=said.append)
        assert not (tmp_path / "killed").exists()
    annotating(chats, scorer(40)).make(tmp_path / "killed", quiet=True, say=said.append)  # what was kept is not scored
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    annotating(chats, None).make(tmp_path / "killed", quiet=True, say=said.append)
    assert said[-1].endswith("done and valid")


@pytest.mark.slow
def test_what_lies_there_and_what_cannot_be_is_refused(chats: Path, tmp_path: Path) -> None:
    place, say = tmp_path / "annotated", print
    annotating(chats, scorer()).make(place, quiet=True, say=say)
    with pytest.raises(NotOursError, match=r"by\.weights: one -> other"):
        annotating(chats, scorer(), "other").make(place, quiet=True, say=say)
    annotating(chats, scorer(), "other").make(place, overwrite=True, quiet=True, say=say)
    with pytest.raises(DataError, match="has reward, teacher_ids already"):
        annotating(place, scorer()).make(tmp_path / "twice", quiet=True, say=say)
    with pytest.raises(NonFiniteError, match="reward of document 0 of train is not finite"):
        annotating(chats, scorer(spoilt=np.inf)).make(tmp_path / "spoilt", quiet=True, say=say)
    with pytest.raises(DataError, match="input and output lie in one another"):
        annotating(chats, scorer()).make(chats / "annotated", quiet=True, say=say)
    with pytest.raises(NotOursError, match="not made as 'annotated_dataset'"):
        annotating(chats, scorer()).make(shutil.copytree(chats, tmp_path / "users"), overwrite=True, say=say)
