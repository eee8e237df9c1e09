"""A compact vocabulary keeps what is frequent and spells the rest, and no text is lost by it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.files import write_record
from vpmoe.errors import DataError, TokenizerError
from vpmoe.tokenizer import load_tokenizer
from vpmoe.tokenizer.compact import FIXED_IDS, CompactVocabulary, padded_size
from vpmoe.tokenizer.interface import pieces_file_bytes
from vpmoe.tokenizer.o200k_harmony import NAMED_SPECIAL_TOKENS, VOCAB_SIZE, O200kHarmony

CORPUS = "What is 37 + 45? ones 7+5=1 2 tens 3+4+1=0 8 sum 0 8 2. The larger of two numbers is the maximum."


def counted(full: O200kHarmony, text: str = CORPUS) -> np.ndarray:
    return np.bincount(full.encode_ordinary(text), minlength=VOCAB_SIZE)


@pytest.fixture(scope="module")
def compact(full: O200kHarmony) -> CompactVocabulary:
    return CompactVocabulary.from_counts(full, counted(full), max_size=275)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_encode_then_decode_is_the_identity(compact: CompactVocabulary, text: str) -> None:
    ids = compact.encode_ordinary(text)
    assert ids.dtype == np.int32
    assert not any(compact.is_special(int(token)) for token in ids)
    assert compact.decode(ids) == text


@given(full_ids=st.lists(st.integers(0, 199_997) | st.sampled_from(sorted(NAMED_SPECIAL_TOKENS.values()))))
def test_any_full_ids_keep_their_bytes(compact: CompactVocabulary, full_ids: list[int]) -> None:
    assert compact.decode_bytes(compact.from_o200k(full_ids)) == compact.full.decode_bytes(full_ids)


def test_kept_ids_stay_single_tokens_and_the_vocabulary_is_full(compact: CompactVocabulary, full: O200kHarmony) -> None:
    assert compact.vocab_size == 275
    kept = set(compact.o200k_ids.tolist())
    for full_id in full.encode_ordinary(CORPUS).tolist():
        expected = 1 if full_id in kept else len(full.decode_bytes([full_id]))
        assert len(compact.from_o200k([full_id])) == expected


def test_the_most_frequent_are_kept_and_ties_go_to_the_lower_id(full: O200kHarmony) -> None:
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    counts[[1000, 2000, 3000, 4000]] = [5, 9, 5, 1]
    kept = CompactVocabulary.from_counts(full, counts, max_size=FIXED_IDS + 2).o200k_ids.tolist()
    assert [i for i in kept if 256 <= i < 199_998] == [1000, 2000]
    rare_cut = CompactVocabulary.from_counts(full, counts, min_count=5).o200k_ids.tolist()
    assert [i for i in rare_cut if 256 <= i < 199_998] == [1000, 2000, 3000]


def test_special_ids_are_the_last_and_keep_their_names(compact: CompactVocabulary) -> None:
    assert sorted(compact.special_tokens.values()) == list(range(compact.vocab_size - 9, compact.vocab_size))
    for spelling, full_id in NAMED_SPECIAL_TOKENS.items():
        token = compact.special_id(spelling)
        assert compact.is_special(token) and compact.decode([token]) == spelling
        assert compact.from_o200k([full_id]).tolist() == [token]
    assert compact.eod_id == compact.special_id("<|endoftext|>")
    with pytest.raises(TokenizerError, match="reserved_200000"):
        compact.special_id("<|reserved_200000|>")
    with pytest.raises(TokenizerError, match="200000"):
        compact.from_o200k([200_000])


def test_padding_of_the_vocabulary(full: O200kHarmony) -> None:
    assert padded_size(275, None) == 384 and padded_size(384, None) == 384
    own = CompactVocabulary.from_counts(full, counted(full), max_size=275, padded_vocab_size=300)
    assert own.padded_vocab_size == len(own.pieces()) == 300
    assert own.pieces()[275:] == [b""] * 25
    with pytest.raises(TokenizerError, match="below the vocabulary's 275"):
        padded_size(275, 274)
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        own.decode([275])


def test_too_small_a_vocabulary_is_refused(full: O200kHarmony) -> None:
    with pytest.raises(TokenizerError, match=str(FIXED_IDS)):
        CompactVocabulary.from_counts(full, counted(full), max_size=FIXED_IDS - 1)


def test_saved_and_loaded_by_hash(compact: CompactVocabulary, full: O200kHarmony, tmp_path: Path) -> None:
    path = tmp_path / "compact_vocab.npy"
    digest = compact.save(path)
    again = CompactVocabulary.load(full, path, sha256=digest)
    assert np.array_equal(again.o200k_ids, compact.o200k_ids) and again.sha256 == digest
    with pytest.raises(TokenizerError, match="sha256"):
        CompactVocabulary.load(full, path, sha256="0" * 64)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda ids: ids[1:], "lacks 1 byte or special tokens"),
        (lambda ids: ids[:-1], "lacks 1 byte or special tokens"),
        (lambda ids: ids[::-1], "strictly increasing"),
        (lambda ids: np.append(ids, VOCAB_SIZE), "strictly increasing"),
        (lambda ids: np.append(ids, VOCAB_SIZE - 1), "reserved special ids"),
        (lambda ids: ids.astype(np.float32), "dtype float32"),
        (lambda ids: ids[:0], "strictly increasing"),
    ],
)
def test_a_wrong_map_is_refused(compact: CompactVocabulary, full: O200kHarmony, change, fault: str) -> None:
    with pytest.raises(TokenizerError, match=fault):
        CompactVocabulary(full, change(compact.o200k_ids))


def write_manifest(folder: Path, tokenizer: CompactVocabulary | O200kHarmony, **changes: object) -> None:
    pieces = {"path": "token_pieces.txt", "sha256": ""}
    told = {"tokenizer": {**tokenizer.entry, "pieces": pieces, **changes}, "splits": {}}
    write_record(folder / "manifest.json", {"schema_version": 1, "kind": "harmony_kd", "seq_length": 8, **told})


def test_load_tokenizer_gives_back_what_the_manifest_names(
    compact: CompactVocabulary, full: O200kHarmony, tmp_path: Path
) -> None:
    compact.save(tmp_path / "compact_vocab.npy")
    write_manifest(tmp_path, compact)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.name, loaded.vocab_size) == (compact.name, compact.vocab_size)
    assert pieces_file_bytes(loaded) == pieces_file_bytes(compact)
    write_manifest(tmp_path, full)
    assert load_tokenizer(tmp_path).vocab_size == VOCAB_SIZE


def test_load_tokenizer_refuses_what_it_cannot_trust(compact: CompactVocabulary, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset here \(no manifest\.json\)"):
        load_tokenizer(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        load_tokenizer(tmp_path)
    manifest.write_text("{}")
    with pytest.raises(DataError, match="no hash of itself"):
        load_tokenizer(tmp_path)
    compact.save(tmp_path / "compact_vocab.npy")
    write_manifest(tmp_path, compact, compact_map={"path": "compact_vocab.npy", "sha256": "0" * 64})
    with pytest.raises(TokenizerError, match="sha256"):
        load_tokenizer(tmp_path)
