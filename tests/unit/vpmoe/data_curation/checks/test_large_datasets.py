"""Looking at a dataset takes the same memory whatever its size, and copies across its splits are found."""

import json
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from megatron_vpmoe.token_files import read_triple
from vpmoe.cli import main
from vpmoe.data_curation.checks import duplicates
from vpmoe.data_curation.checks.sample import sample_split
from vpmoe.data_curation.checks.verify import verify
from vpmoe.data_curation.conversations.convert import convert
from vpmoe.data_curation.conversations.synth import resolve_synth
from vpmoe.data_curation.datasets.encode import Block, Documents
from vpmoe.data_curation.datasets.finish import finish
from vpmoe.data_curation.datasets.kd import build
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.datasets.write import ShardWriter
from vpmoe.data_curation.look.text import documents
from vpmoe.data_curation.manifest import read_manifest
from vpmoe.errors import NotOursError
from vpmoe.harmony.prompts import Prompts
from vpmoe.tokenizer import load_tokenizer
from vpmoe.tokenizer.o200k_harmony import load_o200k_harmony

LENGTH = 2048
EOD = load_o200k_harmony().eod_id


def texts(count: int, seed: int) -> Documents:
    tokens = np.random.default_rng(seed).integers(0, 100_000, (count, LENGTH), dtype=np.int32)
    lossmask = np.ones_like(tokens, dtype=np.uint8)
    tokens[:, -1], lossmask[:, -1] = EOD, 0
    return Documents(tokens.ravel(), lossmask.ravel(), np.zeros(tokens.size, np.uint8), np.full(count, LENGTH))


def text_dataset(folder: Path, count: int) -> Path:
    """One shard of ``count`` thousand random documents, written as the builder writes."""
    options = BuildOptions(seq_len=LENGTH)
    folder.mkdir()
    writer = ShardWriter(folder, "shard_00", LENGTH, folder / "rejects.jsonl")
    for number in range(count):
        block = Block("shard_00", rows_read=1000, parts={"train": [texts(1000, number)]})
        writer.add(block)
    writer.add(Block("shard_00", rows_read=10, parts={"valid": [texts(10, count)]}))
    entries = {"kind": "healing_text", "split_rule": {}, "prompts": None}
    finish(folder, options, [writer.close()], options.as_manifest(), {}, entries)
    return folder


def peak(work: Callable[[], object]) -> float:
    """Megabytes that are held at most while ``work`` is done."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_is_the_same_at_any_size_of_a_shard(tmp_path: Path) -> None:
    found: dict[str, list[float]] = {}
    for count in (2, 8):  # 4 and 16 M tokens; a mask of a whole shard alone would be 16 MB, its counts as int64 134 MB
        folder = text_dataset(tmp_path / str(count), count)
        manifest, tokenizer = read_manifest(folder), load_tokenizer(folder)
        tokenizer.decode([1])
        jobs = {
            "verify": lambda folder=folder: verify(folder, parsed_per_shard=0) == [] or pytest.fail("not sound"),
            "stats": lambda folder=folder, manifest=manifest: sample_split(folder, manifest, "train", 0),
            "inspect": lambda folder=folder, manifest=manifest, own=tokenizer: list(
                islice(documents(folder, manifest, own, "train", 1900, 3), 3)
            ),
        }
        for name, job in jobs.items():
            found.setdefault(name, []).append(peak(job))
    for name, (small, large) in found.items():
        assert large < small + 2 and large < 48, (name, found)
    triple = read_triple(tmp_path / "8" / "train", "shard_00")
    assert isinstance(triple.starts.base, np.memmap) and isinstance(triple.lengths.base, np.memmap)


def test_parts_are_all_documents_in_their_order(dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_triple(dataset_dir / "train", "shard_00")
    for tokens, group in ((1, 1), (300, 1), (300, 2), (1 << 20, 2)):
        monkeypatch.setattr("megatron_vpmoe.token_files.PART_TOKENS", tokens)
        parts = list(whole.parts(group))
        assert all(part.documents % group == 0 for part in parts[:-1]) and all(part.starts[0] == 0 for part in parts)
        assert all(len(part.tokens) <= max(tokens, group * int(whole.lengths.max())) for part in parts)
        for signal in ("tokens", "lossmask", "span", "lengths"):
            assert np.array_equal(np.concatenate([getattr(part, signal) for part in parts]), getattr(whole, signal))


def copies(folder: Path) -> Path:
    """Conversations that all come twice, under different ids."""
    folder.mkdir()
    rows = [
        {"synth_id": f"{copy} {n}", "query": f"What is {n}?", "synthetic_reasoning": "r", "synthetic_answer": f"{n}"}
        for copy in ("first", "second")
        for n in range(100)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert(resolve_synth(str(folder / "rows.jsonl")), folder / "conversations", num_shards=3, prompts=Prompts())
    return folder / "conversations"


@pytest.mark.slow
def test_copies_across_splits_are_found_and_a_split_by_content_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations, options = copies(tmp_path / "in"), {"valid_fraction": 0.5, "seq_len": 400}
    build(conversations, tmp_path / "by_id", BuildOptions(**options), quiet=True)
    for together in (1 << 22, 40):  # in one pass and in many
        monkeypatch.setattr(duplicates, "_TOGETHER", together)
        (fault,) = verify(tmp_path / "by_id")
        assert "documents of the smaller split are in the other one too" in fault and "--split-by content" in fault
        assert 20 < int(fault.split()[0]) < 80
    command = [
        "data",
        "build",
        "--input-dir",
        str(conversations),
        "--output-dir",
        str(tmp_path / "by_content"),
        "--quiet",
    ]
    numbers = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main([*command, *numbers, "--split-by", "content"]) == 0
    assert verify(tmp_path / "by_content") == []
    manifest = read_manifest(tmp_path / "by_content")
    assert manifest["config"]["split_by"] == "content" and "the conversation as JSON" in manifest["split_rule"]["rule"]
    assert all(split["rows"] > 50 and split["rows"] % 2 == 0 for split in manifest["splits"].values())
    with pytest.raises(NotOursError, match=r"config\.split_by: content -> id"):
        build(conversations, tmp_path / "by_content", BuildOptions(**options), quiet=True)
