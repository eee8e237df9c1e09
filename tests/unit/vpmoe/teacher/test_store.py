"""The store: what a teacher says of each supervised position, as it says it alone, whatever was killed on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vpmoe.annotation import NO_RECORD
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.model.attention.masks import SequenceLayout
from vpmoe.cli import main
from vpmoe.data_curation.checks.verify import verify
from vpmoe.data_curation.manifest import read_manifest as raw_manifest
from vpmoe.eval.open_model import open_model
from vpmoe.teacher import annotate, megatron

pytestmark = pytest.mark.slow
K = 12


def score(dataset: Path, teacher: Path | str, output: Path, *more: str, expected: int = 0) -> Path:
    where = ["--teacher", str(teacher), "--output-dir", str(output), "--top-k", str(K), "--quiet"]
    assert main(["data", "score", str(dataset), *where, *more]) == expected
    return output


def documents(dataset: Path, split: str) -> list:
    opened = KDDataset(read_manifest(dataset), split, seq_length=192)
    return [opened[number] for number in range(len(opened))]


@pytest.fixture(scope="module")
def exact(kd_dataset: Path, nano_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact") / "scored"
    return score(kd_dataset, nano_teacher, folder, "--coding", "exact", "--temperature", "1.5")


def test_records_are_what_the_teacher_says_of_each_document_alone(exact: Path, nano_teacher: Path) -> None:
    assert verify(exact) == []
    told = raw_manifest(exact)["annotated"][-1]
    positions, captured = 0, 0.0
    with open_model(nano_teacher) as opened, torch.no_grad():
        among = opened.tokenizer.vocab_size
        for split in ("train", "valid"):
            for document in documents(exact, split):
                tokens = torch.from_numpy(document.tokens.astype(np.int64))[None]
                layout = SequenceLayout(
                    torch.zeros_like(tokens, dtype=torch.int32), torch.arange(tokens.shape[1])[None]
                )
                log_p = (opened.model(tokens, layout).logits()[0].double() / 1.5).log_softmax(-1)
                places = np.flatnonzero(document.loss_mask)
                top, ids = log_p[places, :among].topk(K)
                found = document.annotations
                assert (
                    found["teacher_ids"][places] == ids.numpy()
                ).mean() > 0.999  # but for what fp32 cannot tell apart
                np.testing.assert_allclose(found["teacher_log_p"][places], top, atol=2e-5)
                of_label = log_p[places, document.tokens[places + 1]]
                np.testing.assert_allclose(found["teacher_label_log_p"][places], of_label, atol=2e-5)
                elsewhere = np.setdiff1d(np.arange(len(document.tokens)), places)
                assert (found["teacher_ids"][elsewhere] == NO_RECORD).all()
                positions, captured = positions + len(places), captured + float(top.exp().sum())
    shown = ["--count", "1", "--html", str(exact.parent / "page.html")]
    assert main(["data", "inspect", str(exact), *shown]) == 0
    page = (exact.parent / "page.html").read_text()
    assert "a teacher&#x27;s view, token by token" in page and f"K = {K} at temperature 1.5" in page
    assert told["positions"] == positions and told["coverage"] == 1 and told["mean_coding_kl"] == 0
    assert told["mean_captured_mass"] == pytest.approx(captured / positions, abs=1e-5)


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "receipt.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Killed(BaseException):
    """What no one answers."""


def test_killed_anywhere_it_is_the_same_store(
    kd_dataset: Path, nano_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of the conversations, compactly; and what the coding costs is told."""
    how = ["--fraction", "0.6", "--batch-tokens", "500"]
    score(kd_dataset, nano_teacher, tmp_path / "whole", *how)
    assert verify(tmp_path / "whole") == []
    told = raw_manifest(tmp_path / "whole")["annotated"][-1]
    assert 0.3 < told["coverage"] < 0.9 and 0 < told["mean_coding_kl"] < 1e-5 and not told["short_records"]
    score(kd_dataset, nano_teacher, tmp_path / "shared", *how, "--workers", "2")
    assert tree(tmp_path / "shared") == tree(tmp_path / "whole")
    monkeypatch.setattr(annotate, "_SAVE_SECONDS", 0.0)
    whole, calls = megatron.answers, 0

    def until(*asked: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise Killed
        return whole(*asked)

    monkeypatch.setattr(megatron, "answers", until)
    for _ in range(20):
        try:
            score(kd_dataset, nano_teacher, tmp_path / "killed", *how)
            break
        except Killed:
            assert not (tmp_path / "killed").exists()
    assert calls > 5 and tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_which_conversations_are_scored(kd_dataset: Path, nano_teacher: Path, tmp_path: Path) -> None:
    def scored(folder: Path) -> list[tuple[str, int]]:
        kept = []
        for split in ("train", "valid"):
            for number, document in enumerate(documents(folder, split)):
                asked = document.annotations["teacher_ids"][document.loss_mask != 0] != NO_RECORD
                assert asked.all() or not asked.any()
                kept += [(split, number)] if asked.all() else []
        return kept

    supervised = [int(document.loss_mask.sum()) for document in documents(kd_dataset, "train")]
    budget = sum(supervised[:7]) + supervised[7] - 1
    by_budget = score(kd_dataset, nano_teacher, tmp_path / "budget", "--token-budget", str(budget))
    assert scored(by_budget) == [("train", number) for number in range(7)]
    (tmp_path / "list").write_text("valid 0\ntrain 11\n\ntrain 3\n")
    by_list = score(kd_dataset, nano_teacher, tmp_path / "listed", "--selection", str(tmp_path / "list"))
    assert scored(by_list) == [("train", 3), ("train", 11), ("valid", 0)] and verify(by_list) == []
    for content in (b"train 999\n", b"train " + b"9" * 5000, b"\xff\xfe"):
        (tmp_path / "list").write_bytes(content)
        score(kd_dataset, nano_teacher, tmp_path / "no", "--selection", str(tmp_path / "list"), expected=2)
    for temperature in ("0", "-1", "nan", "inf"):
        score(kd_dataset, nano_teacher, tmp_path / "no", f"--temperature={temperature}", expected=2)
    score(kd_dataset, nano_teacher, tmp_path / "no", "--fraction", "0.5", "--token-budget", "9", expected=2)
    score(kd_dataset, nano_teacher, tmp_path / "no", "--top-k", "999", expected=2)
    score(kd_dataset, nano_teacher, tmp_path / "no", "--token-budget", "1", expected=2)
    assert not (tmp_path / "no").exists()


def test_a_damaged_record_is_named(exact: Path, tmp_path: Path) -> None:
    shutil.copytree(exact, tmp_path / "damaged")
    [file, *_] = sorted((tmp_path / "damaged" / "train").glob("*_teacher.bin"))
    content = bytearray(file.read_bytes())
    content[:4] = b"\xff\xff\xff\x7f"
    file.write_bytes(content)
    assert any(file.name in fault for fault in verify(tmp_path / "damaged"))
    with pytest.raises(DataError, match="an id outside the vocabulary"):
        [document.annotations["teacher_ids"] for document in documents(tmp_path / "damaged", "train")]
