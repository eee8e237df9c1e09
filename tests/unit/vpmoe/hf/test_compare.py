"""``hf compare``: its exit code judges, nothing is compared that was not read, and no directory's code is run."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vpmoe.files import file_entry
from tests.tiny_qwen3 import write_qwen3
from tests.tiny_student import write_student
from vpmoe.cli import main
from vpmoe.errors import WeightsError
from vpmoe.hf import tokenizer_files
from vpmoe.hf.convert import export_checkpoint, import_directory, open_directory
from vpmoe.tokenizer.bpe import save_bpe, train_bpe

NORM = "model.norm.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    folder = write_qwen3(root / "hf", num_hidden_layers=1, vocab_size=64)
    return folder, import_directory(open_directory(folder), root / "megatron").path


def changed(pair: tuple[Path, Path], tmp_path: Path, change: Callable[[Tensors], object]) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(pair[0], folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def compare(folder: Path, checkpoint: Path, *words: str) -> int:
    return main(["hf", "compare", str(folder), str(checkpoint), "--steps", "4", *words])


def test_the_exit_code_is_the_judgement(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(*pair) == 0
    other = changed(pair, tmp_path, lambda tensors: tensors[NORM].mul_(1.001))
    assert compare(other, pair[1], "--tolerance", "0.01") == 0, "the same greedy tokens"
    assert "identical" in capsys.readouterr().out
    assert compare(other, pair[1]) == 1
    assert "not the same model: logits differ by" in capsys.readouterr().err


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = changed(pair, tmp_path, lambda tensors: tensors[name][3].fill_(value))
    for words in (["compare", str(folder), str(pair[1])], ["import", str(folder), str(tmp_path / "megatron")]):
        assert main(["hf", *words]) == 2
        assert f"{name}: 48 of 3840 values are not finite" in capsys.readouterr().err
    assert not (tmp_path / "megatron").exists()


def test_what_is_not_there_is_not_made_up(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = changed(pair, tmp_path, lambda tensors: tensors.pop(NORM))
    assert compare(missing, pair[1]) == 2
    assert f"{NORM}" in capsys.readouterr().err
    (missing / "model.safetensors").write_bytes(b"no weights")
    assert compare(missing, pair[1]) == compare(tmp_path / "nothing", pair[1]) == 2
    other = write_qwen3(tmp_path / "other", num_hidden_layers=2, vocab_size=64)
    assert compare(other, pair[1]) == compare(pair[0], tmp_path / "nothing") == 2
    said = capsys.readouterr().err
    assert said.count("remedy") == 4 and "Traceback" not in said
    silent = tmp_path / "silent"
    shutil.copytree(pair[1], silent)
    state = json.loads((silent / "run_state.json").read_text())
    (silent / "run_state.json").write_text(json.dumps({**state, "config": None}))
    files = json.loads((silent / "files.json").read_text())
    files["run_state.json"] = file_entry(silent / "run_state.json")
    (silent / "files.json").write_text(json.dumps(files))
    assert compare(pair[0], silent) == 2
    assert "it says no geometry" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"max_position_embeddings": "many"}, "max_position_embeddings = 'many'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_parameters.rope_theta = 0"),
        ({"rope_parameters": None, "rope_theta": -1.0}, "rope_theta = -1.0"),
    ],
)
def test_a_configuration_that_cannot_run_is_one_message(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], told: dict[str, object], said: str
) -> None:
    folder = changed(pair, tmp_path, lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **told}))
    assert compare(folder, pair[1]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_code_in_a_directory_is_run_on_the_users_word_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_bpe(train_bpe(["the ship left the harbour"], 300), tmp_path / "bpe")
    assets = tokenizer_files.assets_of(tmp_path / "bpe")
    checkpoint = write_student(tmp_path / "megatron", assets=assets, padded_vocab_size=384, num_layers=2)
    exported = export_checkpoint(checkpoint, tmp_path / "hf").path
    for name in ("configuration", "modeling"):
        (exported / f"{name}_vpmoe.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nraise ImportError")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # whoever asks is answered
    assert compare(exported, checkpoint) == 0
    assert tokenizer_files.open_tokenizer(exported)("the ship")["input_ids"]
    path = exported / "tokenizer_config.json"
    path.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["modeling_vpmoe.Own", None]}, "tokenizer_class": "Own"}))
    with pytest.raises(WeightsError, match="no tokenizer there"):
        tokenizer_files.open_tokenizer(exported)
    assert not (tmp_path / "was_run").exists()
    assert compare(exported, checkpoint, "--trust-remote-code") == 2
    assert (tmp_path / "was_run").exists()
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, "max_position_embeddings": "many"}))
    assert compare(exported, checkpoint) == 2
    said = capsys.readouterr().err
    assert "load or run it: ImportError" in said and "max_position_embeddings = 'many'" in said
