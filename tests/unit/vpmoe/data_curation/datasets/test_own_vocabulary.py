"""Datasets of every kind in a vocabulary of their own, in the splits that their rows say."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dropping_hub import Hub

from megatron_vpmoe.files import read_json_lines
from megatron_vpmoe.token_files import read_triple
from tests.learned_vocabulary import SENTENCES, write_vocabulary
from vpmoe.cli import main
from vpmoe.data_curation.checks.verify import verify
from vpmoe.data_curation.datasets.vocabularies import Texts, write_bpe
from vpmoe.data_curation.rows.source import resolve
from vpmoe.errors import DataError
from vpmoe.harmony.parse import Parser
from vpmoe.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "valid", "test")
FIELDS = {
    "text": [("text",)],
    "chat": [("prompt", "completion")],
    "pairs": [("prompt", "chosen"), ("prompt", "rejected")],
}
"""What each document of a row says."""


def rows(kind: str, count: int = 30) -> list[dict]:
    """As a corpus of stories has them: every third of them is of each split."""
    told = {
        "text": lambda i: {"text": f"{SENTENCES[i % 3]} {i}"},
        "chat": lambda i: {"prompt": f"Tell of {i}.", "completion": f"Once there was {i}."},
        "pairs": lambda i: {"prompt": f"Tell of {i}.", "chosen": f"Once, {i}.", "rejected": f"Tom, {i}."},
    }
    extra = {} if kind == "text" else {"constraints": {"protagonist": "fox", "required": ["ball"]}}
    return [{"id": f"s{i}", "split": SPLITS[i % 3], **told[kind](i), **extra} for i in range(count)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"))


def written(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def build(kind: str, vocabulary: Path, folder: Path, *more: str, lines: list[dict] | None = None) -> int:
    source = written(folder / f"{kind}.jsonl", lines or rows(kind))
    options = ["--id-field", "id", "--split-field", "split", "--tokenizer", str(vocabulary), "--quiet"]
    options += [] if kind == "text" else ["--ignore-fields", "constraints"]
    return main(["data", f"build-{kind}", "--input", str(source), "--output-dir", str(folder / kind), *options, *more])


def stored(folder: Path, split: str, tokenizer: Tokenizer) -> list[list[str]]:
    """The texts of each document: a text, or a conversation's messages."""
    triple, found = read_triple(folder / split, "shard_00"), []
    for place in map(triple.place, range(triple.documents)):
        ids = triple.tokens[place][:-1].tolist()
        chat = tokenizer.is_special(ids[0])
        found.append([m.content for m in Parser(tokenizer).messages(ids)] if chat else [tokenizer.decode(ids)])
    return found


@pytest.mark.parametrize("kind", ["text", "chat", "pairs"])
def test_rows_come_back_from_the_split_that_they_say(kind: str, vocabulary: Path, tmp_path: Path) -> None:
    assert build(kind, vocabulary, tmp_path) == 0
    folder = tmp_path / kind
    manifest, tokenizer = json.loads((folder / "manifest.json").read_text()), load_tokenizer(folder)
    assert manifest["tokenizer"]["name"] == "hf_tokenizer" and tokenizer.special_id("<|return|>") > 0
    assert manifest["documents"]["other_split"] == 10 and manifest["documents"]["rows_read"] == 30
    assert (manifest["config"]["split_by"], manifest["config"]["split_field"]) == ("field", "split")
    assert "split says" in manifest["split_rule"]["rule"]
    for split in ("train", "valid"):
        of_split = [row for row in rows(kind) if row["split"] == split]
        expected = [[row[name] for name in fields] for row in of_split for fields in FIELDS[kind]]
        assert stored(folder, split, tokenizer) == expected
    assert verify(folder) == []


def test_a_row_without_its_split_is_a_reject_and_a_fraction_beside_the_column_is_refused(
    vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"id": "a", "text": "once"}, {"id": "b", "text": "twice", "split": "valid"}]
    assert build("text", vocabulary, tmp_path, "--no-strict", lines=lines) == 2
    err = capsys.readouterr().err
    assert "none of the 2 rows is in the split train" in err and "--split-field split" in err
    (reject,) = [line for _, line in read_json_lines(next(tmp_path.rglob("rejects.jsonl")))]
    assert reject["reason"] == "missing_field" and "split" in reject["detail"]
    assert build("text", vocabulary, tmp_path, "--valid-fraction", "0.1", lines=lines) == 2
    assert "the column 'split' says the split" in capsys.readouterr().err
    lines = [{"id": "a", "text": "once", "split": "train"}]
    assert build("text", vocabulary, tmp_path, "--overwrite", lines=lines) == 0
    assert "the split valid is empty: no row that was kept says so in split" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["chat", "pairs"])
def test_conversations_need_harmonys_tokens_and_our_renderer(
    kind: str, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_vocabulary(tmp_path / "plain", special_tokens="qwen")
    assert build(kind, plain, tmp_path) == 2
    err = capsys.readouterr().err
    assert "has no Harmony tokens" in err and "vpmoe tokenizer train --special-tokens harmony" in err
    assert build(kind, vocabulary, tmp_path, "--renderer", "official") == 2
    assert "openai_harmony writes o200k's ids, not those of --tokenizer" in capsys.readouterr().err
    assert not [*tmp_path.glob(f"{kind}*.partial")], "refused before anything is made"


def test_a_vocabulary_is_learned_from_the_first_train_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"split": SPLITS[i % 3], "text": ("fox " if i % 3 == 0 and i < 30 else "owl ") * 9} for i in range(60)]
    path = written(tmp_path / "rows.jsonl", lines)
    command = ["tokenizer", "train", "--input", str(path), "--special-tokens", "harmony", "--vocab-size", "267"]
    command += ["--split-field", "split", "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--max-rows", "10"]) == 0
    assert capsys.readouterr().out.endswith("267 ids\n")
    learned = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert "fox" in learned and "owl" not in learned
    assert main([*command, "--max-rows", "30"]) == 2
    assert "options.max_rows: 10 -> 30" in capsys.readouterr().err
    assert main([*command, "--max-rows", "0"]) == 2
    assert "0 rows" in capsys.readouterr().err
    larger = ["400" if part == "267" else part for part in command]
    assert main([*larger, "--max-rows", "10", "--overwrite"]) == 0
    assert "ids of 400: the texts have no more pairs to merge" in capsys.readouterr().out
    path = written(tmp_path / "without.jsonl", [{"text": "fox"}])
    with pytest.raises(DataError, match="no text in 'split'"):
        list(Texts(resolve(str(path)), "text", "split"))


def test_of_a_hub_dataset_no_more_rows_are_asked_for_than_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"text": [f"{SENTENCES[i % 3]} {i}" for i in range(400)]}), tmp_path / "rows.parquet")
    hub, asked = Hub(tmp_path, 0.0), list[int]()
    monkeypatch.setattr(hub, "drop_perhaps", lambda: asked.append(1))
    monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
    source = resolve("roneneldan/TinyStories", "f" * 40)
    size = write_bpe(Texts(source, "text", max_rows=50), tmp_path / "out", vocab_size=300, special_tokens="harmony")
    assert size == 300 and 50 <= len(asked) <= 53


def test_prompts_of_such_a_dataset_are_the_users_message_alone(vocabulary: Path, tmp_path: Path) -> None:
    assert build("chat", vocabulary, tmp_path) == 0
    output = tmp_path / "prompts.jsonl"
    questions = written(tmp_path / "questions.jsonl", [{"prompt": "Tell of a fox.", "constraints": {"required": []}}])
    command = ["data", "prompts", "--input", str(questions), "--field", "prompt", "--output", str(output)]
    assert main(command) == 2
    assert main([*command, "--tokenizer", str(vocabulary)]) == 0
    alone = output.read_bytes()
    assert main([*command, "--dataset", str(tmp_path / "chat")]) == 0
    assert output.read_bytes() == alone
    first, asked = [line for _, line in read_json_lines(output)]
    tokenizer = load_tokenizer(tmp_path / "chat")
    assert first == {"vocabulary": tokenizer.identity} and asked["row"]["constraints"] == {"required": []}
    said = tokenizer.decode(asked["ids"])
    assert said == "<|start|>user<|message|>Tell of a fox.<|end|><|start|>assistant"


def test_distillation_data_is_built_in_it(conversations_dir: Path, vocabulary: Path, tmp_path: Path) -> None:
    command = ["data", "build", "--input-dir", str(conversations_dir), "--output-dir", str(tmp_path / "kd"), "--quiet"]
    command += ["--tokenizer", str(vocabulary), "--seq-len", "1024", "--valid-fraction", "0.1", "--workers", "1"]
    assert main([*command, "--padded-vocab-size", "320"]) == 0
    assert verify(tmp_path / "kd") == []
    manifest = json.loads((tmp_path / "kd" / "manifest.json").read_text())
    assert manifest["truncation"]["whole"] > 0 and manifest["tokenizer"]["padded_vocab_size"] == 320
    assert main([*command, "--compact-vocab-size", "512"]) == 2
