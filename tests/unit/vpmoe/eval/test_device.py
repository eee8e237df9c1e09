"""Every tool that loads a model asks it on the model's device, also where that is not the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pretended_device import lend
from tests.tiny_qwen3 import write_qwen3
from vpmoe.cli import main
from vpmoe.eval.open_model import open_model
from vpmoe.eval.suites.likelihood import score_texts
from vpmoe.hf.convert import import_directory, open_directory
from vpmoe.hf.parity import compare
from vpmoe.upcycle.vocabulary_report import measure

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An HF directory, and the same model as rung 1 has it."""
    folder = tmp_path_factory.mktemp("qwen")
    write_qwen3(folder / "hf")
    import_directory(open_directory(folder / "hf"), folder / "object" / "megatron")
    return folder / "hf", folder / "object" / "megatron" / "iter_0000000"


def test_a_tensor_made_on_the_wrong_device_is_caught(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lend(monkeypatch) as card, open_model(run_directory) as opened, torch.no_grad():
        assert (opened.model.device.type, torch.zeros(2).device.type) == ("xpu", "cpu")
        weight = opened.model.output_weight()
        with pytest.raises(AssertionError, match="meets the card's"):
            _ = weight @ torch.zeros(weight.shape[1])
    assert card.met


def test_evaluation_of_a_ladder(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["Seven and eight are fifteen.", "One."]
    with open_model(run_directory) as opened, torch.no_grad():
        expected = score_texts(opened.model, opened.tokenizer, texts, 2)
    with lend(monkeypatch) as card, open_model(run_directory) as opened, torch.no_grad():
        before = card.met
        found = score_texts(opened.model, opened.tokenizer, texts, 2)
        assert card.met > before, "the model is not on the card"
    assert found == pytest.approx(expected)


def test_sampling_and_evaluation(
    data: Path, run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = ["--only-valid", "--logprobs", "--temperature", "1", "--top-k", "9", "--min-p", "0.01", "--samples", "2"]
    asked = [
        "--questions",
        str(data / "rows" / "test.jsonl"),
        "--per-family",
        "1",
        "--output",
        str(tmp_path / "a.json"),
    ]
    run, question = str(run_directory), "What is 1 + 2?"
    for words in (["sample", run, question], ["sample", run, question, *drawn], ["eval", "nano", run, *asked]):
        with lend(monkeypatch) as card:
            assert main([*words, "--max-new-tokens", "24"]) == 0, words
        assert card.met


def test_a_model_on_the_cpu_by_choice_is_asked_there(qwen: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """``hf compare`` and the check of rung 1."""
    with lend(monkeypatch):
        found = compare(qwen[0], qwen[1], prompt_lengths=(1, 5), greedy_steps=4)
    assert found.greedy_identical and found.logits.largest < 1e-3


def test_vocabulary_report(qwen: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Bytes:
        def __call__(self, text: str, **_how: object) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

    sides = (qwen[1], qwen[1])
    expected = measure(sides, (Bytes(), Bytes()), ["Fifteen."])
    with lend(monkeypatch):
        assert measure(sides, (Bytes(), Bytes()), ["Fifteen."]) == expected
