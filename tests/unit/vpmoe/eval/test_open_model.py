"""A run, its checkpoint, its export, an object of a ladder: each opens by itself, with its own messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vpmoe.errors import CheckpointError, TokenizerError
from tests.tiny_qwen3 import write_qwen3
from vpmoe.cli import main
from vpmoe.errors import WeightsError
from vpmoe.eval.open_model import open_model
from vpmoe.hf.convert import export_checkpoint, import_directory, open_directory
from vpmoe.tokenizer.bpe import save_bpe, train_bpe

pytestmark = pytest.mark.slow
KINDS = ("run", "checkpoint", "renamed", "object", "export")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, run_directory: Path) -> dict[str, Path]:
    """The same weights in every form."""
    folder = tmp_path_factory.mktemp("models")
    export_checkpoint(run_directory, folder / "export")
    import_directory(open_directory(folder / "export"), folder / "object" / "megatron")
    return {
        "run": run_directory,
        "checkpoint": run_directory / "checkpoints" / "iter_0000000",
        "renamed": shutil.copytree(run_directory / "checkpoints" / "iter_0000000", folder / "the_best_one"),
        "export": folder / "export",
        "object": folder / "object",
    }


@pytest.fixture
def alone(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Neither the dataset nor its conversations are there any more; the questions are."""
    monkeypatch.chdir(tmp_path)
    away = tmp_path / "away"
    away.mkdir()
    questions = shutil.copy(data / "rows" / "test.jsonl", tmp_path / "questions.jsonl")
    for name in ("rows", "conversations", "dataset"):
        shutil.move(data / name, away / name)
    yield Path(questions)
    for name in ("rows", "conversations", "dataset"):
        shutil.move(away / name, data / name)


@pytest.mark.parametrize("kind", KINDS)
def test_same_weights_and_messages(kind: str, models: dict[str, Path], data: Path, run_directory: Path) -> None:
    saved = torch.load(run_directory / "weights.pt")
    prompts = json.loads((data / "conversations" / "manifest.json").read_text())["prompts"]
    with open_model(models[kind]) as opened:
        loaded = dict(opened.model.named_parameters())
        assert loaded.keys() == saved.keys()
        assert [name for name, value in loaded.items() if not torch.equal(value, saved[name])] == []
        assert not opened.model.training
        assert opened.prompts is not None
        assert {message.role: message.content for message in opened.prompts} == {
            role: prompts[role] for role in ("system", "developer")
        }
        assert opened.context == 192
        assert opened.run_directory == (run_directory if kind in ("run", "checkpoint") else None)


@pytest.mark.parametrize("kind", KINDS)
def test_sample_without_dataset_and_conversations(kind: str, models: dict[str, Path], alone: Path, capsys) -> None:
    assert main(["sample", str(models[kind]), "What is 1 + 2?", "--max-new-tokens", "3"]) == 0
    told = capsys.readouterr()
    assert "What is 1 + 2?" in told.out and "Valid channels" in told.out.replace("\n", " ")
    assert "as stored with" in told.err
    assert main(["sample", str(models[kind]), "what " * 99]) == 2
    assert "and the model was trained on 192" in capsys.readouterr().err


def test_several_valid_samples_with_log_probabilities(models: dict[str, Path], capsys) -> None:
    draw = ["--samples", "2", "--temperature", "1", "--top-k", "50", "--min-p", "0.001", "--max-new-tokens", "40"]
    assert main(["sample", str(models["run"]), "What is 1 + 2?", *draw, "--logprobs", "--only-valid"]) == 0
    told = capsys.readouterr().out
    assert told.count("tokens, valid Harmony") == 2 and "'<|return|>'" in told


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_without_dataset_and_conversations(kind: str, models: dict[str, Path], alone: Path, capsys) -> None:
    words = ["--questions", str(alone), "--per-family", "1", "--max-new-tokens", "2", "--output", "report.json"]
    assert main(["eval", "nano", str(models[kind]), *words]) == 0
    assert "no losses are measured" in capsys.readouterr().err
    report = json.loads(Path("report.json").read_text())
    assert report["losses"] == {} and report["dataset"] is None and report["tasks"]["all"]["n"] == 4
    assert report["asked"]["system"] and report["asked"]["developer"]


def test_a_dataset_that_is_asked_for_has_to_be_there(models: dict[str, Path], alone: Path, capsys) -> None:
    words = ["--questions", str(alone), "--data-path", "nowhere"]
    assert main(["eval", "nano", str(models["run"]), *words]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_losses_of_an_export_are_those_of_its_run(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    words = ["--questions", str(data / "rows" / "test.jsonl"), "--per-family", "1", "--max-new-tokens", "1"]
    found = []
    for kind in ("run", "export"):
        output = tmp_path / f"{kind}.json"
        named = ["--data-path", str(data / "dataset"), "--output", str(output)]
        assert main(["eval", "nano", str(models[kind]), *words, *named]) == 0
        found.append(json.loads(output.read_text())["losses"])
    assert found[0].pop("loss/total")  # weighted as the run's configuration says, which an export does not know
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0].keys() == {"loss/analysis", "loss/final"}


def test_a_qwen3_is_asked_in_plain_text(tmp_path: Path, capsys) -> None:
    write_qwen3(tmp_path / "qwen", vocab_size=300)
    save_bpe(train_bpe(["Question: What is 1 + 2?\nAnswer: 3\n"] * 3, 290), tmp_path / "qwen")
    assert main(["sample", str(tmp_path / "qwen"), "What is 1 + 2?", "--max-new-tokens", "3"]) == 0
    told = capsys.readouterr()
    assert "Question: What is 1 + 2?" in told.out and "no Harmony tokens" in told.err
    assert main(["sample", str(tmp_path / "qwen"), "One and two", "--passage", "--max-new-tokens", "3"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("One and two\n\n") and "plain text to go on with" in told.err
    assert main(["sample", str(tmp_path / "qwen"), "What is 1 + 2?", "--only-valid"]) == 2
    assert "plain text has no grammar" in capsys.readouterr().err


def changed(run: Path, folder: Path, change) -> Path:
    """A checkpoint with another run_state.json, in its list of files too."""
    from megatron_vpmoe.files import file_entry, json_bytes

    copy = folder / "iter_0000000"
    shutil.copytree(next(run.rglob("iter_0000000")), copy)
    state = json.loads((copy / "run_state.json").read_text())
    change(state)
    (copy / "run_state.json").write_bytes(json_bytes(state))
    files = json.loads((copy / "files.json").read_text())
    files["run_state.json"] = file_entry(copy / "run_state.json")
    (copy / "files.json").write_bytes(json_bytes(files))
    return copy


def test_a_missing_field_is_named_and_not_called_a_version(run_directory: Path, tmp_path: Path) -> None:
    lacking = changed(run_directory, tmp_path / "a", lambda state: state["config"]["model"].pop("hidden_size"))
    with (
        pytest.raises(CheckpointError, match=r"model\.hidden_size is missing") as caught,
        open_model(lacking),
    ):
        pass
    assert "version" not in str(caught.value)
    without = changed(run_directory, tmp_path / "b", lambda state: state.pop("config"))
    with pytest.raises(CheckpointError, match="config is missing"), open_model(without):
        pass


def test_a_missing_field_of_an_object_is_named_too(models: dict[str, Path], tmp_path: Path) -> None:
    lacking = changed(models["object"], tmp_path, lambda state: state["config"]["model"].pop("num_layers"))
    with pytest.raises(WeightsError, match=r"model\.num_layers is missing") as caught, open_model(lacking):
        pass
    assert "version" not in str(caught.value)


def test_messages_of_a_wrong_shape_and_no_vocabulary(run_directory: Path, tmp_path: Path) -> None:
    wrong = changed(run_directory, tmp_path / "a", lambda state: state.update(prompts=["You are."]))
    with pytest.raises(CheckpointError, match="prompts are"), open_model(wrong):
        pass
    bare = changed(run_directory, tmp_path / "b", lambda state: None)
    listed = json.loads((bare / "files.json").read_text())
    shutil.rmtree(bare / "assets")
    kept = {name: entry for name, entry in listed.items() if not name.startswith("assets/")}
    (bare / "files.json").write_text(json.dumps(kept))
    with pytest.raises(TokenizerError, match="carries no vocabulary"), open_model(bare):
        pass
