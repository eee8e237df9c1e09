"""Plain text: stored whole, supervised whole, cut, filtered, rid of duplicates, restartable, and fit to train on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest_dataset import tree
from dropping_hub import Hub
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.files import file_entry, read_record
from megatron_vpmoe.token_files import read_triple
from vpmoe.cli import main
from vpmoe.data_curation.checks.verify import verify
from vpmoe.data_curation.datasets import build as pipeline
from vpmoe.data_curation.datasets.plan import BuildOptions, split_of
from vpmoe.data_curation.datasets.sequential import Pass, build_sequential
from vpmoe.data_curation.datasets.text import HealingText, cut, text_hash
from vpmoe.data_curation.manifest import write_manifest
from vpmoe.data_curation.rows import hub as hub_rows
from vpmoe.data_curation.rows.source import resolve
from vpmoe.errors import DataError, NotOursError
from vpmoe.tokenizer import load_tokenizer

WORDS = ["the", "bread", "water", "learns", "漢字", "é", "😀", "train,", "<|end|>", "long\n\nwords", "", "and", "12345"]
SEQ_LEN = 64
BASE = BuildOptions(seq_len=SEQ_LEN, valid_fraction=0.2)


def texts(count: int) -> list[str]:
    draw = random.Random(3)
    return [f"{i} " + " ".join(draw.choices(WORDS, k=draw.randint(3, 80))) for i in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(path: Path, output: Path, kind: HealingText, extent: Pass | None = None, **options) -> dict:
    return build_sequential(resolve(str(path)), output, kind, extent or Pass(), quiet=True, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"id": f"d{i}", "text": text, "lang": "en" if i % 3 else "fr"} for i, text in enumerate(texts(120))]
    return write(tmp_path_factory.mktemp("text") / "rows.jsonl", rows)


def stored_documents(folder: Path, split: str) -> list[tuple[str, list[int]]]:
    """``(text, piece lengths)`` of each document of a split, its pieces put together again."""
    tokenizer = load_tokenizer(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    found: list[tuple[str, list[int]]] = []
    ids: list[int] = []
    lengths: list[int] = []
    for shard in manifest["splits"][split]["shards"]:
        triple = read_triple(folder / split, shard["name"])
        for place in map(triple.place, range(triple.documents)):
            assert not triple.span[place].any()
            assert triple.lossmask[place].tolist() == [1] * (place.stop - place.start - 1) + [0]
            ids += triple.tokens[place].tolist()
            lengths.append(place.stop - place.start)
            if ids[-1] == tokenizer.eod_id:
                found.append((tokenizer.decode(ids[:-1]), lengths))
                ids, lengths = [], []
    assert not ids
    return found


@pytest.mark.parametrize("compact", [False, True])
def test_every_text_comes_back_from_its_split(source: Path, dataset_dir: Path, tmp_path: Path, compact: bool) -> None:
    base = BASE
    if compact:
        base = BuildOptions(seq_len=SEQ_LEN, valid_fraction=0.2, compact_map=dataset_dir / "compact_vocab.npy")
    manifest = build(source, tmp_path, HealingText(base, id_field="id"), Pass(shard_tokens=1500))
    assert (manifest["kind"], manifest["schema_version"], manifest["seq_length"]) == ("healing_text", 1, SEQ_LEN)
    assert manifest["prompts"] is None
    assert len(manifest["splits"]["train"]["shards"]) > 2
    for split in ("train", "valid"):
        found = stored_documents(tmp_path, split)
        wanted = [text for i, text in enumerate(texts(120)) if split_of(f"d{i}", 0.2) == split]
        assert [text for text, _ in found] == wanted
        assert all(set(lengths[:-1]) <= {SEQ_LEN, SEQ_LEN - 1} for _, lengths in found)
        assert any(len(lengths) > 1 for _, lengths in found)
    assert verify(tmp_path) == []
    if compact:
        assert manifest["tokenizer"]["compact_map"]["sha256"] == manifest["config"]["compact_map_sha256"]
    assert read_record(tmp_path / "manifest.json") == manifest


@given(st.integers(2, 400), st.integers(16, 64))
def test_pieces_are_the_document_and_none_is_a_single_token(length: int, seq_len: int) -> None:
    ids = np.arange(length, dtype=np.int32)
    pieces = cut(ids, seq_len)
    assert np.array_equal(np.concatenate(pieces), ids)
    assert all(2 <= len(piece) <= seq_len for piece in pieces)


def test_duplicates_go_and_are_counted(tmp_path: Path) -> None:
    rows = ["Some  text here", "some text\nHERE ", "ＳＯＭＥ text here", "another", "text here some"]
    path = write(tmp_path / "rows.jsonl", [{"text": text} for text in rows])
    manifest = build(path, tmp_path / "out", HealingText(BuildOptions(valid_fraction=0)))
    assert manifest["documents"] == {"rows_read": 5, "kept": 3, "duplicates_dropped": 2}
    assert [text for text, _ in stored_documents(tmp_path / "out", "train")] == [rows[0], rows[3], rows[4]]
    assert text_hash("é") == text_hash(unicodedata.normalize("NFD", "É"))


def test_the_budget_is_not_exceeded(source: Path, tmp_path: Path) -> None:
    manifest = build(source, tmp_path, HealingText(BASE), Pass(shard_tokens=700, token_budget=2000))
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    assert 2000 - 400 < tokens <= 2000
    read = manifest["documents"]["rows_read"]
    assert (
        manifest["documents"]["kept"]
        == read
        == len([*stored_documents(tmp_path, "train"), *stored_documents(tmp_path, "valid")])
    )
    assert verify(tmp_path) == []


def test_languages_are_kept_by_a_named_field_only(source: Path, tmp_path: Path) -> None:
    manifest = build(source, tmp_path, HealingText(BASE, language_field="lang", languages=("fr",)))
    assert manifest["documents"]["kept"] == 40 and manifest["documents"]["other_language"] == 80
    with pytest.raises(DataError, match="languages are not guessed"):
        HealingText(BASE, languages=("fr",))
    with pytest.raises(DataError, match="no language to keep"):
        HealingText(BASE, language_field="lang")


def test_long_documents_may_be_dropped(source: Path, tmp_path: Path) -> None:
    manifest = build(source, tmp_path, HealingText(BASE, drop_long=True))
    counts = manifest["truncation"]
    assert counts["whole"] + counts["dropped_too_long"] == 120 and counts["dropped_too_long"] > 10
    assert all(len(lengths) == 1 for _, lengths in stored_documents(tmp_path, "train"))


def test_unusable_documents_are_rejected_with_place_and_reason(tmp_path: Path) -> None:
    rows = [{"text": "good"}, {"text": " \n"}, {"text": "nul\0"}, {"text": "\ud800"}, {"other": 1}, {"text": 3}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="5 of 6 rows were rejected"):
        build(path, tmp_path / "out", HealingText(BuildOptions(valid_fraction=0)))
    assert not (tmp_path / "out").exists()
    # The strictness is not part of the key: nothing that is done is thrown away.
    manifest = build(path, tmp_path / "out", HealingText(BuildOptions(valid_fraction=0, strict=False)))
    reasons = {"empty_field": 1, "nul": 1, "invalid_utf8": 1, "missing_field": 2}
    assert manifest["rejects"]["reasons"] == dict(sorted(reasons.items()))
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == [f"rows.jsonl:{n}" for n in range(2, 7)]
    assert "nul" in rejects[1]["excerpt"] and verify(tmp_path / "out") == []


def test_a_bad_place_in_a_good_source_does_not_end_the_build(tmp_path: Path) -> None:
    """12 of the first 1,012 rows are bad, but only 12 of 3,000: a limit of 1 % is kept."""
    rows = [{"text": " " if i in range(1000, 1012) else f"row {i}"} for i in range(3000)]
    path = write(tmp_path / "rows.jsonl", rows)
    manifest = build(path, tmp_path / "out", HealingText(BuildOptions(valid_fraction=0, max_reject_fraction=0.01)))
    assert manifest["rejects"]["count"] == 12 and manifest["documents"]["kept"] == 2988


def test_a_refusal_over_the_limit_keeps_the_finished_shards(tmp_path: Path) -> None:
    rows = [{"text": f"row {i} " + "word " * 20} for i in range(1000)] + [{"text": " "}] * 3000
    path = write(tmp_path / "rows.jsonl", rows)
    options, extent = {"valid_fraction": 0, "max_reject_fraction": 0.01}, Pass(shard_tokens=5000)
    with pytest.raises(DataError, match="rows were rejected") as caught:
        build(path, tmp_path / "out", HealingText(BuildOptions(**options)), extent)
    assert "of 4000 rows" not in str(caught.value), "it did not have to read on to the end"
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "train").glob("shard_0[01]*")}
    assert len(done) == 12
    build(path, tmp_path / "out", HealingText(BuildOptions(**options, strict=False)), extent)
    assert all((tmp_path / "out" / "train" / name).stat().st_mtime_ns == when for name, when in done.items())


def test_an_interrupted_build_ends_with_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubled = write(tmp_path / "rows.jsonl", [json.loads(line) for line in source.read_text().splitlines()] * 2)
    kind, extent = HealingText(BASE), Pass(shard_tokens=1000)
    whole = build(doubled, tmp_path / "whole", kind, extent)
    assert whole["documents"]["duplicates_dropped"] == 120
    original = pipeline.ShardWriter.close

    def stop_at_third(self: pipeline.ShardWriter) -> dict:
        if self.name == "shard_02":
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(pipeline.ShardWriter, "close", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        build(doubled, tmp_path / "cut", kind, extent)
    monkeypatch.undo()
    assert not (tmp_path / "cut").exists()
    with pytest.raises(NotOursError, match=r"unfinished work lies here.*long_documents: pieces -> dropped"):
        build(doubled, tmp_path / "cut", HealingText(BASE, drop_long=True), extent)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut.partial" / "train").glob("shard_0[01]*")}
    assert {name[:8] for name in done} == {"shard_00", "shard_01"}
    build(doubled, tmp_path / "cut", kind, extent)
    assert all((tmp_path / "cut" / "train" / name).stat().st_mtime_ns == when for name, when in done.items())
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert build(doubled, tmp_path / "cut", kind, extent) == whole
    with pytest.raises(NotOursError, match=r"finished work lies here.*long_documents: pieces -> dropped"):
        build(doubled, tmp_path / "cut", HealingText(BASE, drop_long=True), extent)


@pytest.mark.slow
def test_a_hub_that_drops_the_connection_changes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pa.Table.from_pylist([json.loads(line) for line in source.read_text().splitlines()])
    (tmp_path / "hub").mkdir()
    pq.write_table(rows, tmp_path / "hub" / "rows.parquet", row_group_size=30)
    monkeypatch.setattr(hub_rows, "_STATE_ROWS", 10)
    kind, extent = HealingText(BASE), Pass(shard_tokens=1000)

    def built(hub: Hub, output: Path) -> dict[str, bytes]:
        monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
        build_sequential(resolve("owner/rows", "c0ffee" * 6 + "c0ff"), output, kind, extent, quiet=True)
        return tree(output)

    whole = built(Hub(tmp_path / "hub", 0), tmp_path / "whole")
    monkeypatch.setattr(hub_rows, "RETRY_SECONDS", (0,) * 5)
    hub = Hub(tmp_path / "hub", 0.1)
    assert built(hub, tmp_path / "retried") == whole and hub.drops > 3
    monkeypatch.setattr(hub_rows, "RETRY_SECONDS", ())
    for attempt in range(200):
        with suppress(DataError):
            assert built(Hub(tmp_path / "hub", 0.03, attempt), tmp_path / "gone on with") == whole
            break
    assert attempt > 1 and tree(tmp_path / "gone on with") == whole


@pytest.mark.slow
def test_a_killed_build_ends_with_the_same_bytes(tmp_path: Path, repository: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts(6000)])
    extent = Pass(shard_tokens=8000)
    build(path, tmp_path / "whole", HealingText(BASE), extent)
    options = ["--input", path, "--output-dir", tmp_path / "cut", "--seq-len", SEQ_LEN, "--valid-fraction", 0.2]
    command = [
        sys.executable,
        "-m",
        "vpmoe.cli",
        "data",
        "build-text",
        *options,
        "--shard-tokens",
        extent.shard_tokens,
        "--quiet",
    ]
    for kept in (2, 9):
        process = subprocess.Popen(
            list(map(str, command)), env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        )
        # The memory of a shard is kept when it ends.
        state = tmp_path / "cut.partial" / "scratch" / f"shard_{kept:02d}.state"
        while process.poll() is None and not state.exists():
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it finished before it was killed"
        assert state.exists() and not (tmp_path / "cut").exists()
    build(path, tmp_path / "cut", HealingText(BASE), extent)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_a_full_disk_leaves_the_finished_shards(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = pipeline.ShardWriter.close

    def no_space(self: pipeline.ShardWriter) -> dict:
        if self.name == "shard_01":
            raise OSError(28, "No space left on device")
        return original(self)

    monkeypatch.setattr(pipeline.ShardWriter, "close", no_space)
    with pytest.raises(
        DataError, match=r"No space left.*finished and safe: shard_00; missing: shard_01 and what follows"
    ):
        build(source, tmp_path, HealingText(BASE), Pass(shard_tokens=1000))
    monkeypatch.undo()
    build(source, tmp_path, HealingText(BASE), Pass(shard_tokens=1000))
    assert verify(tmp_path) == []


def test_verify_sees_a_mask_that_is_not_of_text(source: Path, tmp_path: Path) -> None:
    manifest = build(source, tmp_path, HealingText(BASE))
    path = tmp_path / "train" / "shard_00_lossmask.bin"
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    files = manifest["splits"]["train"]["shards"][0]["files"]
    assert any("sha256" in fault for fault in verify(tmp_path))
    files[path.name] = file_entry(path)
    write_manifest(tmp_path, manifest)
    assert any("loss mask is not that of plain text" in fault for fault in verify(tmp_path))


def test_the_command_says_what_it_did(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--input", str(source), "--output-dir", str(tmp_path / "out")]
    arguments = ["data", "build-text", *folders, "--seq-len", "64", "--valid-fraction", "0.2"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "kept 120" in captured.out and "rows/s" in captured.err
    assert main([*arguments, "--language", "en"]) == 2
    assert "remedy: name the column" in capsys.readouterr().err


@pytest.mark.usefixtures("single_process")
def test_the_training_side_reads_it_and_has_a_loss(source: Path, dataset_dir: Path, tmp_path: Path) -> None:

    from megatron_vpmoe.data.batch import assemble
    from megatron_vpmoe.data.kd_dataset import KDDataset
    from megatron_vpmoe.data.packing import pack
    from megatron_vpmoe.model.builder import build_model
    from megatron_vpmoe.objectives import build_objective
    from megatron_vpmoe.training.step import layout_of
    from tests.tiny import tiny_config

    base = BuildOptions(seq_len=SEQ_LEN, valid_fraction=0.2, compact_map=dataset_dir / "compact_vocab.npy")
    build(source, tmp_path, HealingText(base))
    cfg = tiny_config(objective="token_ce", seq_length=SEQ_LEN, padded_vocab_size=512)
    dataset = KDDataset.open(tmp_path, "train", seq_length=SEQ_LEN, padded_vocab_size=512)
    rows = [[dataset[int(i)] for i in row] for row in pack(dataset.lengths, SEQ_LEN, companion_minimum=0)[:8]]
    batch = assemble(rows, seq_length=SEQ_LEN, eod_id=dataset.eod_id, sample_ids=range(8))
    assert int(batch.loss_mask.sum()) == batch.real_tokens - sum(int(row.max()) + 1 for row in batch.document_id)
    objective, model = build_objective(cfg), build_model(cfg)
    totals = {key: float(value) for key, value in objective.counts([batch]).items()}
    loss = objective(model(batch.tokens, layout_of(batch)), batch, totals).loss
    loss.backward()
    assert abs(loss.item() - np.log(512)) < 1
