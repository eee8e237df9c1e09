"""Verification finds whatever was changed after the build, and says where."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.files import file_entry, read_record, write_record
from megatron_vpmoe.token_files import read_triple
from tests.fixtures_dataset import write_annotation
from vpmoe.data_curation.checks.verify import verify
from vpmoe.data_curation.manifest import write_manifest
from vpmoe.errors import DataError
from vpmoe.tokenizer.from_dataset import load_tokenizer


@pytest.fixture
def copy(dataset_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset_dir, tmp_path / "dataset"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    """Change a manifest with the hash of itself, as nobody but a program would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    write_manifest(folder, manifest)


def accept(folder: Path, split: str = "train") -> None:
    """Write the present hashes into the manifest, so that only a look at the content can find the change."""

    def change(manifest: dict) -> None:
        for shard in manifest["splits"][split]["shards"]:
            shard["files"] = {name: file_entry(folder / split / name) for name in shard["files"]}

    edit_manifest(folder, change)


def test_a_sound_dataset_has_no_fault(dataset_dir: Path, conversations_dir: Path) -> None:
    assert verify(dataset_dir, input_dir=conversations_dir) == []
    assert verify(conversations_dir) == []


@pytest.mark.parametrize(
    "name",
    [
        "train/shard_00_tokens.bin",
        "train/shard_01_lossmask.bin",
        "valid/shard_00_span.bin",
        "train/shard_02_tokens.idx",
        "compact_vocab.npy",
        "token_pieces.txt",
    ],
)
def test_a_flipped_bit_anywhere_is_found(copy: Path, name: str) -> None:
    flip(copy / name, (copy / name).stat().st_size // 2)
    faults = verify(copy)
    assert faults and any(Path(name).name in fault and "sha256" in fault for fault in faults)


def test_each_lost_or_strange_file_is_found(copy: Path) -> None:
    (copy / "train" / "shard_00_span.idx").unlink()
    (copy / "train" / "shard_09_tokens.bin").write_bytes(b"")
    (copy / "rejects.jsonl").unlink()
    faults = "\n".join(verify(copy))
    for named in ("shard_00_span.idx", "shard_09_tokens.bin", "rejects.jsonl"):
        assert named in faults


def test_a_truncated_index_is_found_even_with_its_hash_accepted(copy: Path) -> None:
    path = copy / "train" / "shard_00_tokens.idx"
    path.write_bytes(path.read_bytes()[:-8])
    accept(copy)
    with pytest.raises(DataError, match="its header asks for"):
        read_triple(copy / "train", "shard_00")
    assert any("shard_00_tokens.idx" in fault for fault in verify(copy))


def test_swapped_sidecars_are_found_even_with_their_hashes_accepted(copy: Path) -> None:
    mask, span = (copy / "train" / f"shard_00_{signal}.bin" for signal in ("lossmask", "span"))
    content = mask.read_bytes()
    mask.write_bytes(span.read_bytes())
    span.write_bytes(content)
    accept(copy)
    (fault,) = [fault for fault in verify(copy) if "shard_00" in fault]
    assert "loss mask and span disagree" in fault


def test_sidecars_of_another_shard_are_found(copy: Path) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(copy / "train" / f"shard_01_span.{suffix}", copy / "train" / f"shard_00_span.{suffix}")
    accept(copy)
    assert any("span and tokens disagree" in fault for fault in verify(copy))


def _set(folder: Path, signal: str, values: np.ndarray) -> None:
    (folder / "train" / f"shard_00_{signal}.bin").write_bytes(values.tobytes())
    accept(folder)


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("ids outside the vocabulary", lambda t: {"tokens": np.where(np.arange(len(t.tokens)) == 3, 10_000, t.tokens)}),
        ("do not end in <|endoftext|>", lambda t: {"tokens": np.where(t.tokens == t.tokens[-1], 0, t.tokens)}),
        ("span ids that do not exist", lambda t: {"span": np.where(t.span == 2, 3, t.span)}),
        ("last label is supervised", lambda t: {"span": np.maximum(t.span, 1), "lossmask": np.ones_like(t.lossmask)}),
        ("its tokens say", lambda t: {"span": np.where(t.span == 2, 1, t.span)}),
        ("not valid Harmony", lambda t: {"tokens": np.where(np.arange(len(t.tokens)) == 0, 5, t.tokens)}),
    ],
)
def test_contents_that_contradict_themselves_are_found(copy: Path, fault: str, change: Callable) -> None:
    triple = read_triple(copy / "train", "shard_00")
    for signal, values in change(triple).items():
        _set(copy, signal, values.astype(getattr(triple, signal).dtype))
    assert any(fault in found for found in verify(copy)), verify(copy)


def test_messages_without_text_are_found_in_any_document(copy: Path) -> None:
    special, tokens = load_tokenizer(copy).special_tokens, read_triple(copy / "train", "shard_00").tokens.copy()
    tokens[np.flatnonzero(tokens == special["<|message|>"])[-2] + 1] = special["<|end|>"]
    _set(copy, "tokens", tokens)
    assert any("1 messages without text" in fault for fault in verify(copy, parsed_per_shard=0)), verify(copy)


def test_wrong_sums_in_the_manifest_are_found(copy: Path) -> None:
    edit_manifest(copy, lambda manifest: manifest["splits"]["train"]["span_tokens"].update(final=1))
    assert any("do not add up" in fault for fault in verify(copy))
    edit_manifest(copy, lambda manifest: manifest["splits"]["valid"]["shards"][0].update(rows=1))
    assert any("valid/shard_00" in fault for fault in verify(copy))


def test_a_stale_manifest_is_found(copy: Path, conversations_dir: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(conversations_dir, tmp_path / "input"))
    edit_manifest(source, lambda manifest: manifest.update(rows=399))
    (fault,) = verify(copy, input_dir=source)
    assert "the dataset was built from" in fault
    (fault,) = verify(copy, input_dir=tmp_path / "nowhere")
    assert "no manifest" in fault


def test_conversations_that_changed_are_found(conversations_dir: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(conversations_dir, tmp_path / "input"))
    flip(source / "shard_01.parquet", 200)
    shutil.copy(source / "shard_00.parquet", source / "shard_07.parquet")
    faults = verify(source)
    assert len(faults) == 2 and "shard_01.parquet" in faults[0] and "shard_07.parquet" in faults[1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m["shards"][0].update(row_groups=1), "3 row_groups, the manifest says 1"),
        (lambda m: m["shards"].append(m["shards"][0]), "each shard once"),
        (lambda m: m.update(rows=1), "do not add up to 1 rows"),
    ],
)
def test_what_a_manifest_of_conversations_counts_is_counted_again(
    conversations_dir: Path, tmp_path: Path, change: Callable, named: str
) -> None:
    folder = Path(shutil.copytree(conversations_dir, tmp_path / "conversations"))
    edit_manifest(folder, change)
    (fault,) = verify(folder)
    assert named in fault


def test_without_a_manifest_there_is_nothing_to_verify(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        verify(copy)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda manifest: manifest.pop("tokenizer"), "tokenizer: Field required"),
        (lambda manifest: manifest["splits"]["train"].pop("shards"), "splits.train.shards: Field required"),
        (lambda manifest: manifest.update(splits=None), "splits: Input should be"),
        (lambda manifest: manifest["splits"]["train"]["shards"][0].update(files=3), "files: Input should be"),
        (lambda manifest: manifest["tokenizer"]["pieces"].update(path="../../pieces"), "no name of a file"),
    ],
)
def test_a_manifest_of_another_shape_is_one_error(copy: Path, change: Callable, named: str) -> None:
    edit_manifest(copy, change)
    with pytest.raises(DataError, match=named):
        verify(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["tokenizer"]["special_tokens"].update({"<|end|>": 3}),
        lambda manifest: manifest["tokenizer"].update(rank_file_sha256="0" * 64),
        lambda manifest: manifest.update(config_hash="0" * 64),
        lambda manifest: manifest["length_histogram"]["train"]["counts"].reverse(),
        lambda manifest: manifest.update(sha256=None),
        lambda manifest: manifest.update(strange=1),
    ],
)
def test_any_edit_of_a_manifest_is_seen(copy: Path, conversations_dir: Path, change: Callable) -> None:
    for folder in (copy, Path(shutil.copytree(conversations_dir, copy / "input"))):
        path = folder / "manifest.json"
        manifest = {"tokenizer": {"special_tokens": {}}, "length_histogram": {"train": {"counts": [1, 2]}}}
        manifest |= json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=r"manifest\.json (was edited|has no hash)"):
            verify(folder)


def test_an_edited_receipt_is_seen(copy: Path, conversations_dir: Path) -> None:
    for folder in (copy, Path(shutil.copytree(conversations_dir, copy / "input"))):
        path = folder / "receipt.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 0}))
        assert [fault for fault in verify(folder) if "receipt.json was edited" in fault], folder


def test_edited_rejects_are_seen(copy: Path, conversations_dir: Path, tmp_path: Path) -> None:
    for folder in (copy, Path(shutil.copytree(conversations_dir, tmp_path / "input"))):
        (folder / "rejects.jsonl").write_text("\n")
        (fault,) = verify(folder)
        assert "rejects.jsonl does not have the sha256" in fault


def test_what_the_manifest_counts_is_counted_again(copy: Path) -> None:
    edit_manifest(copy, lambda manifest: manifest["length_histogram"]["train"]["counts"].reverse())
    edit_manifest(copy, lambda manifest: manifest["tokenizer"]["special_tokens"].update({"<|end|>": 3}))
    vocabulary, histogram = verify(copy)
    assert "special_tokens is another" in vocabulary and "length_histogram.train" in histogram


def test_a_manifest_from_before_it_had_a_hash_is_read_where_its_receipt_vouches_for_it(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"no hash of itself, and manifest\.json does not have the sha256"):
        verify(copy)
    receipt = read_record(copy / "receipt.json")
    receipt["files"]["manifest.json"] = file_entry(copy / "manifest.json")
    write_record(copy / "receipt.json", receipt)
    assert verify(copy) == []
    (copy / "receipt.json").unlink()
    with pytest.raises(DataError, match=r"receipt\.json does not vouch for it"):
        verify(copy)


SCORE = Annotation(name="reward", dtype="float32", per="document")
TOP = Annotation(name="teacher_ids", dtype="int32", width=2)


def annotate(folder: Path, spoil: Callable[[Annotation, list[np.ndarray]], None] = lambda *_: None) -> None:
    """Sidecars for every shard; ``spoil`` changes what is written of the first."""

    def change(manifest: dict) -> None:
        for split, entry in manifest["splits"].items():
            for shard in entry["shards"]:
                lengths = read_triple(folder / split, shard["name"]).lengths
                for declared in (SCORE, TOP):
                    arrays = [np.ones(declared.shape(int(length)), declared.dtype) for length in lengths]
                    if (split, shard["name"]) == ("train", "shard_00"):
                        spoil(declared, arrays)
                    shard["files"] |= write_annotation(folder / split, shard["name"], declared, arrays)
        manifest["annotations"] = [SCORE.model_dump(), TOP.model_dump()]

    edit_manifest(folder, change)


def test_annotations_are_checked_by_their_declaration(copy: Path) -> None:
    annotate(copy)
    assert verify(copy) == []
    flip(copy / "train" / "shard_00_reward.bin", 2)
    assert any("shard_00_reward.bin" in fault and "sha256" in fault for fault in verify(copy))
    (copy / "valid" / "shard_00_teacher_ids.idx").unlink()
    assert any("shard_00_teacher_ids.idx" in fault for fault in verify(copy))


def _not_a_number(declared: Annotation, arrays: list[np.ndarray]) -> None:
    if declared is SCORE:
        arrays[1] = np.array(np.nan, np.float32)


def _a_document_short(declared: Annotation, arrays: list[np.ndarray]) -> None:
    if declared is SCORE:
        arrays.pop()


def _another_length(declared: Annotation, arrays: list[np.ndarray]) -> None:
    if declared is TOP:
        arrays[1] = arrays[1][:-1]


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (_not_a_number, "reward holds a number that is not finite"),
        (_a_document_short, "documents are annotated with reward"),
        (_another_length, "entries of teacher_ids for the"),
    ],
)
def test_annotations_that_are_not_as_declared_are_found(copy: Path, spoil: Callable, fault: str) -> None:
    annotate(copy, spoil)
    (found,) = [line for line in verify(copy) if "shard_00" in line]
    assert fault in found
