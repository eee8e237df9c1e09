"""The build: each conversation one aligned document, the same bytes for any workers, refusals that name the fault."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest_dataset import OPTIONS, tree

from megatron_vpmoe.files import file_entry, sha256_of_file
from megatron_vpmoe.ownership import owned
from megatron_vpmoe.token_files import read_triple
from vpmoe.cli import main
from vpmoe.data_curation.checks.verify import verify
from vpmoe.data_curation.conversations.store import StoredConversation, open_shard, read_row_group
from vpmoe.data_curation.datasets.kd import build
from vpmoe.data_curation.datasets.plan import BuildOptions, split_of
from vpmoe.data_curation.manifest import read_manifest, write_manifest
from vpmoe.errors import BusyError, DataError, TokenizerError
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.harmony.spans import documents
from vpmoe.tokenizer import load_tokenizer


def conversations(folder: Path, shard: str) -> list[StoredConversation]:
    opened = open_shard(folder / f"{shard}.parquet")
    rows = [row for group in range(opened.num_row_groups) for row in read_row_group(opened, group)]
    return [row for row in rows if isinstance(row, StoredConversation)]


def test_documents_are_the_conversations_with_labels_one_ahead(conversations_dir: Path, dataset_dir: Path) -> None:
    tokenizer = load_tokenizer(dataset_dir)
    renderer = FastRenderer(tokenizer)
    manifest = json.loads((dataset_dir / "manifest.json").read_text())
    for split, entry in manifest["splits"].items():
        for shard in entry["shards"]:
            expected = [
                row for row in conversations(conversations_dir, shard["name"]) if split_of(row.synth_id, 0.05) == split
            ]
            triple = read_triple(dataset_dir / split, shard["name"])
            assert triple.documents == len(expected) == shard["rows"]
            for number, row in enumerate(expected):
                place = triple.place(number)
                tokens, span, _ = documents((renderer.render(row.messages),), tokenizer.eod_id)
                assert np.array_equal(triple.tokens[place], tokens)
                assert triple.span[place].tolist() == [*span[1:], 0]
                assert triple.lossmask[place].tolist() == [int(value > 0) for value in [*span[1:], 0]]


def test_megatron_reads_what_was_written_and_would_write_the_same(dataset_dir: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    for signal_name, dtype in (("tokens", np.int32), ("lossmask", np.uint8), ("span", np.uint8)):
        theirs = IndexedDataset(str(dataset_dir / "train" / f"shard_00_{signal_name}"))
        ours = read_triple(dataset_dir / "train", "shard_00")
        assert len(theirs) == ours.documents
        assert theirs.document_indices.tolist() == list(range(len(theirs) + 1))
        builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
        for place in map(ours.place, range(ours.documents)):
            builder.add_document(getattr(ours, signal_name)[place], [place.stop - place.start])
        builder.finalize(str(tmp_path / "theirs.idx"))
        for suffix in ("bin", "idx"):
            written = (dataset_dir / "train" / f"shard_00_{signal_name}.{suffix}").read_bytes()
            assert written == (tmp_path / f"theirs.{suffix}").read_bytes()
        values = np.concatenate([theirs[number] for number in range(len(theirs))])
        assert values.dtype == dtype and np.array_equal(values, getattr(ours, signal_name))


def test_the_manifest_is_the_contract(conversations_dir: Path, dataset_dir: Path) -> None:
    manifest = json.loads((dataset_dir / "manifest.json").read_text())
    assert (manifest["schema_version"], manifest["kind"], manifest["seq_length"]) == (1, "harmony_kd", 160)
    assert manifest["input_manifest_sha256"] == sha256_of_file(conversations_dir / "manifest.json")
    tokenizer = manifest["tokenizer"]
    assert tokenizer["name"] == "o200k_harmony_compact"
    assert tokenizer["special_tokens"]["<|endoftext|>"] == tokenizer["eod_id"] < tokenizer["vocab_size"]
    pieces = (dataset_dir / tokenizer["pieces"]["path"]).read_bytes().split(b"\n")
    assert len(pieces) == tokenizer["padded_vocab_size"] + 1 and pieces[-1] == b""
    for split in manifest["splits"].values():
        assert split["tokens"] == sum(split["span_tokens"].values()) == sum(s["tokens"] for s in split["shards"])
        assert split["rows"] == sum(s["rows"] for s in split["shards"])
    total = sum(split["rows"] for split in manifest["splits"].values())
    assert total == manifest["truncation"]["whole"] == 400
    assert sum(sum(manifest["length_histogram"][split]["counts"]) for split in manifest["splits"]) == total
    # A run takes them along, so that sampling needs neither the dataset nor its conversations.
    prompts = json.loads((conversations_dir / "manifest.json").read_text())["prompts"]
    assert manifest["prompts"] == {"system": prompts["system"], "developer": None} and prompts["system"]
    text = (dataset_dir / "manifest.json").read_text()
    assert str(dataset_dir) not in text and str(conversations_dir) not in text


def test_the_vocabulary_comes_from_train_alone(conversations_dir: Path, dataset_dir: Path) -> None:
    full = load_tokenizer(dataset_dir).full  # pyright: ignore[reportAttributeAccessIssue]
    renderer, used = FastRenderer(full), set()
    for shard in range(5):
        for row in conversations(conversations_dir, f"shard_{shard:02d}"):
            if split_of(row.synth_id, 0.05) == "train":
                used |= set(renderer.render(row.messages).tokens().tolist())
    kept = np.load(dataset_dir / "compact_vocab.npy").tolist()
    assert {i for i in kept if 256 <= i < 199_998} == {i for i in used if 256 <= i < 199_998}


@pytest.mark.slow
def test_two_workers_write_the_same_bytes_as_one(conversations_dir: Path, dataset_dir: Path, tmp_path: Path) -> None:
    build(conversations_dir, tmp_path / "two", OPTIONS, workers=2, quiet=True)
    assert tree(tmp_path / "two") == tree(dataset_dir)


def test_the_official_renderer_writes_the_same(conversations_dir: Path, dataset_dir: Path, tmp_path: Path) -> None:
    options = BuildOptions(
        seq_len=160, valid_fraction=0.05, renderer="official", compact_map=dataset_dir / "compact_vocab.npy"
    )
    manifest = build(conversations_dir, tmp_path, options, quiet=True)
    assert manifest["renderer"]["version"].startswith("openai-harmony ")
    for split in ("train", "valid"):
        assert tree(tmp_path / split) == tree(dataset_dir / split)


def edited(conversations_dir: Path, target: Path, **changes: object) -> Path:
    """A copy of the conversations with its manifest changed."""
    shutil.copytree(conversations_dir, target)
    write_manifest(target, read_manifest(target) | changes)
    return target


def test_input_that_changed_after_its_manifest_is_refused(conversations_dir: Path, tmp_path: Path) -> None:
    copy = edited(conversations_dir, tmp_path / "input")
    shard = copy / "shard_03.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard_03\.parquet"):
        build(copy, tmp_path / "out", OPTIONS, quiet=True)
    with pytest.raises(DataError, match="of kind 'harmony_kd', expected harmony_conversations"):
        build(edited(conversations_dir, tmp_path / "other", kind="harmony_kd"), tmp_path / "out", OPTIONS, quiet=True)
    with pytest.raises(DataError, match="rows: Field required"):
        build(edited(conversations_dir, tmp_path / "damaged", shards=[{"name": "x"}]), tmp_path / "out", OPTIONS)
    with pytest.raises(DataError, match="does not exist"):
        build(tmp_path / "nothing", tmp_path / "out", OPTIONS, quiet=True)


def test_wrong_options_are_named_all_at_once(conversations_dir: Path, tmp_path: Path) -> None:
    options = BuildOptions(seq_len=4, valid_fraction=1.5, renderer="quick")
    with pytest.raises(DataError) as caught:
        build(conversations_dir, tmp_path, options, quiet=True)
    for named in ("--seq-len 4", "--valid-fraction 1.5", "--renderer quick"):
        assert named in str(caught.value)
    compact = {"compact_vocab_size": 512, "padded_vocab_size": 2**24 + 1}
    for options in ({"seq_len": 2**24 + 1}, {"padded_vocab_size": 2**18}, compact):
        with pytest.raises(DataError, match=f"{list(options.values())[-1]}: "):  # not when all is built
            BuildOptions(**options).check()
    with pytest.raises(TokenizerError, match="no rank file"):
        build(conversations_dir, tmp_path, BuildOptions(tokenizer_model=tmp_path / "none"), quiet=True)


def test_an_empty_valid_split_is_said_and_readable(
    conversations_dir: Path, dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = BuildOptions(seq_len=160, valid_fraction=1e-9, compact_map=dataset_dir / "compact_vocab.npy")
    manifest = build(conversations_dir, tmp_path, options, quiet=True)
    valid = manifest["splits"]["valid"]
    assert (valid["rows"], valid["tokens"], valid["shards"]) == (0, 0, [])
    assert "the split valid is empty" in capsys.readouterr().err
    assert (tmp_path / "valid").is_dir() and verify(tmp_path) == []


def test_a_length_that_drops_everything_is_refused(conversations_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 400 rows"):
        build(conversations_dir, tmp_path, BuildOptions(seq_len=16), quiet=True)


def test_invalid_rows_are_listed_and_strictness_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vpmoe.data_curation.conversations.convert import convert
    from vpmoe.data_curation.conversations.synth import resolve_synth
    from vpmoe.harmony.prompts import Prompts

    rows = [
        {
            "synth_id": f"id{n}",
            "query": "\0" if n in (3, 7) else "q",
            "synthetic_reasoning": "r",
            "synthetic_answer": "a",
        }
        for n in range(10)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("vpmoe.data_curation.conversations.synth.check_text", lambda *_: None)
    monkeypatch.setattr("vpmoe.data_curation.conversations.store.ROW_GROUP_ROWS", 2)
    convert(resolve_synth(str(tmp_path / "rows.jsonl")), tmp_path / "in", num_shards=2, prompts=Prompts())
    folders = ["--input-dir", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")]
    arguments = ["data", "build", *folders, "--workers", "1", "--quiet"]
    assert main(arguments) == 2
    assert not (tmp_path / "out").exists()
    listed = (tmp_path / "out.partial" / "rejects.jsonl").read_text()
    assert main([*arguments, "--no-strict"]) == 0, "the same build may go on with other strictness"
    assert main(arguments) == 2, "what was finished without a limit passes no stricter one"
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert (tmp_path / "out" / "rejects.jsonl").read_text() == listed
    assert all("\\x00" in reject["excerpt"] for reject in rejects)
    found = [(reject["synth_id"], reject["shard"], reject["row"], reject["reason"]) for reject in rejects]
    assert found == [("id3", "shard_01.parquet", 1, "nul"), ("id7", "shard_01.parquet", 3, "nul")]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    told = {"count": 2, "reasons": {"nul": 2}, "path": "rejects.jsonl"}
    assert manifest["rejects"] == {**told, **file_entry(tmp_path / "out" / "rejects.jsonl")}
    assert sum(split["rows"] for split in manifest["splits"].values()) == 8


def test_a_second_builder_is_kept_out(conversations_dir: Path, tmp_path: Path) -> None:
    with owned(tmp_path / ".out.lock", "the dataset"), pytest.raises(BusyError, match=f"process {os.getpid()}"):
        build(conversations_dir, tmp_path / "out", OPTIONS, quiet=True)


def test_split_rule() -> None:
    import hashlib

    for synth_id in ("synth_00409b8fab0bea9c", "a", ""):
        position = int(hashlib.blake2b(synth_id.encode(), digest_size=8).hexdigest(), 16) / 2**64
        assert split_of(synth_id, position * 0.999) == "train" and split_of(synth_id, position * 1.001) == "valid"
    assert split_of("a", 0.0) == "train"
