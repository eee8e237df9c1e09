"""Questions as plain text, and datasets of them under a vocabulary learned from them or cut out of o200k."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_vpmoe.token_files import read_triple
from vpmoe.cli import main
from vpmoe.data_curation.checks.verify import verify
from vpmoe.data_curation.tasks.question_texts import answer_in, document, prompt
from vpmoe.data_curation.tasks.synth_mini import generate
from vpmoe.errors import DataError, NotOursError, TokenizerError
from vpmoe.tokenizer import CompactVocabulary, load_tokenizer
from vpmoe.tokenizer.hf_directory import HFDirectory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 300 rows, a BPE and a compact map of them."""
    root = tmp_path_factory.mktemp("texts")
    generate(root / "rows", rows=300, seed=1, families={"sorting": 0.5, "addition": 0.5})
    for _ in range(2):  # a second time nothing is done
        assert main(["data", "question-texts", "--input-dir", f"{root}/rows", "--output-dir", f"{root}/texts"]) == 0
        words = ["--input", f"{root}/texts/pool.jsonl"]
        assert main(["tokenizer", "train", *words, "--output-dir", f"{root}/bpe", "--vocab-size", "320"]) == 0
        assert main(["data", "compact-map", *words, "--output-dir", f"{root}/o200k", "--size", "300"]) == 0
    return root


def build(root: Path, output: Path, *words: str) -> Path:
    common = ["data", "build-text", "--input", str(root / "texts" / "pool.jsonl"), "--id-field", "synth_id"]
    common += ["--valid-fraction", "0.05", "--seq-len", "64", "--quiet"]
    assert main([*common, "--output-dir", str(output), *words]) == 0
    return output


def texts_of(dataset: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(dataset)
    shards = json.loads((dataset / "manifest.json").read_text())["splits"][split]["shards"]
    triples = [read_triple(dataset / split, shard["name"]) for shard in shards]
    return [
        tokenizer.decode(triple.tokens[triple.place(document)][:-1].tolist())
        for triple in triples
        for document in range(triple.documents)
    ]


def test_both_vocabularies_store_the_same_texts(folder: Path, tmp_path: Path) -> None:
    own = build(folder, tmp_path / "own", "--tokenizer", str(folder / "bpe"), "--padded-vocab-size", "384")
    compact = build(folder, tmp_path / "compact", "--compact-map", str(folder / "o200k" / "compact_vocab.npy"))
    assert isinstance(load_tokenizer(own), HFDirectory)
    assert isinstance(load_tokenizer(compact), CompactVocabulary)
    for split in ("train", "valid"):
        assert texts_of(own, split) == texts_of(compact, split) != []
    assert texts_of(own, "train")[0].startswith("Question: ")
    for dataset in (own, compact):
        assert verify(dataset) == []

    # The dataset carries the tokenizer: it can be read where the directory it came from is gone, and is hashed.
    manifest = json.loads((own / "manifest.json").read_text())
    assert [file["path"] for file in manifest["tokenizer"]["files"]] == [
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    (own / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert any("tokenizer_config.json" in fault for fault in verify(own))
    (own / "tokenizer" / "tokenizer.json").write_text((folder / "bpe" / "tokenizer.json").read_text() + "\n")
    with pytest.raises(TokenizerError, match="the manifest says"):
        load_tokenizer(own)


def test_what_a_dataset_carries_decides_whether_it_is_up_to_date(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder / "bpe", tmp_path / "bpe"))
    options = ("--tokenizer", str(own), "--padded-vocab-size", "384")
    built = build(folder, tmp_path / "own", *options)
    (own / "tokenizer_config.json").write_text("{}")
    with pytest.raises(AssertionError):
        build(folder, tmp_path / "own", *options)
    assert json.loads((built / "tokenizer" / "tokenizer_config.json").read_text())


def test_no_held_out_question_is_in_the_pool(folder: Path) -> None:
    pool, test = (
        [json.loads(line)["text"] for line in (folder / "texts" / name).read_text().splitlines()]
        for name in ("pool.jsonl", "test.jsonl")
    )
    assert len(pool) == 300 and not set(pool) & set(test)


def test_an_answer_is_the_first_line_behind_its_prompt() -> None:
    text = document("Sort the digits 4 1 3.", "1 3 4")
    assert text.startswith(prompt("Sort the digits 4 1 3."))
    assert answer_in(text.removeprefix(prompt("Sort the digits 4 1 3."))) == "1 3 4"


def test_others_are_refused(folder: Path, tmp_path: Path) -> None:
    from vpmoe.data_curation.datasets.plan import BuildOptions
    from vpmoe.data_curation.tasks.question_texts import write_texts

    generate(tmp_path / "rows", rows=10, seed=2, families={"sorting": 1.0})
    with pytest.raises(NotOursError, match=r"rows\.rows_00\.parquet: "):
        write_texts(tmp_path / "rows", folder / "texts")
    assert main(["tokenizer", "train", "--input", str(folder / "texts"), "--output-dir", str(folder / "bpe")]) == 2
    with pytest.raises(DataError, match="--tokenizer is another vocabulary"):
        BuildOptions(tokenizer=folder / "bpe", compact_map=folder / "o200k" / "compact_vocab.npy").check()
