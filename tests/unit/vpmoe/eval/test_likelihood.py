"""Nats, perplexity and bits per byte: of every token once, where they stand and what they are part of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import read_manifest
from vpmoe.cli import main
from vpmoe.eval.open_model import open_model
from vpmoe.eval.suites.likelihood import BUCKETS, measure, text_passages
from vpmoe.eval.valid_split import valid_losses
from vpmoe.tokenizer import CompactVocabulary

TEXTS = ["One and two are three. " * 30, "é", "Seven, señor? " * 3, "Nothing is here but words. " * 4]


@pytest.mark.parametrize(("window", "stride"), [(None, None), (16, None), (16, 16), (16, 1), (7, 3), (5000, 2)])
def test_windows_score_every_token_once(tokenizer: CompactVocabulary, window: int | None, stride: int | None) -> None:
    passages = text_passages(tokenizer, TEXTS, window, stride)
    for number, text in enumerate(TEXTS):
        ids, mine = tokenizer.encode_ordinary(text).tolist(), [one for one in passages if one.document == number]
        labels = np.concatenate([one.labels[one.scored] for one in mine]).tolist()
        assert labels == ids[1:]
        sizes = np.concatenate([one.size[one.scored] for one in mine])
        begins = np.concatenate([one.begin[one.scored] for one in mine])
        assert sizes.sum() == len(tokenizer.decode_bytes(ids[1:]))
        assert begins.tolist() == [len(tokenizer.decode_bytes(ids[:at])) for at in range(1, len(ids))]
        for one in mine:
            assert window is None or len(one.tokens) <= window
            assert one.tokens[1:].tolist() == one.labels[:-1].tolist()
            if window is not None and one is not mine[0]:  # all but a stride of the window stands before
                assert np.flatnonzero(one.scored)[0] >= window - (stride or window // 2)


def test_a_stride_that_leaves_tokens_out_is_refused(tokenizer: CompactVocabulary) -> None:
    with pytest.raises(DataError, match="stride 17 with windows of 16"):
        text_passages(tokenizer, TEXTS, 16, 17)
    with pytest.raises(DataError, match="no text of two tokens"):
        text_passages(tokenizer, ["", "a"], 16)


@pytest.mark.slow
def test_text_by_plain_passes_and_a_report(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Window by window with the model's own forward pass, in fp64; any batch gives the same."""
    window, stride, texts, output = 16, 6, tmp_path / "texts", tmp_path / "r.json"
    texts.mkdir()
    for number, text in enumerate(TEXTS):
        (texts / f"{number}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    command = ["eval", "text", str(run_directory), "--texts", str(texts), "--output", str(output)]
    assert main([*command, "--window", str(window), "--stride", str(stride)]) == 0
    report = json.loads(output.read_text())
    nats = tokens = size = 0
    with open_model(run_directory) as opened, torch.no_grad():
        from megatron_vpmoe.model.attention.masks import left_padded

        for text in TEXTS:
            ids = opened.tokenizer.encode_ordinary(text).tolist()
            scored = 0
            for begin in range(0, len(ids), stride):
                part = ids[begin : begin + window + 1]
                if scored >= len(ids) - 1:
                    break
                log_p = (
                    opened.model(*left_padded([part[:-1]], opened.model.device)).logits()[0].double().log_softmax(-1)
                )
                for at in range(scored - begin, len(part) - 1):
                    nats -= float(log_p[at, part[at + 1]])
                    tokens, size = tokens + 1, size + len(opened.tokenizer.decode_bytes([part[at + 1]]))
                scored = begin + len(part) - 1
        passages = text_passages(opened.tokenizer, TEXTS, window, stride)
        one, many = (measure(opened.model, passages, batch_size=size) for size in (1, 9))
        assert one.cells == pytest.approx(many.cells, rel=1e-6)
    entry = report["tasks"]["text"]
    assert (entry["tokens"], entry["bytes"], entry["n"]) == (tokens, size, 4)
    assert entry["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-5)
    assert entry["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert entry["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)
    places = entry["by_byte_position"]
    assert list(places) == list(BUCKETS[:2]) and sum(place["tokens"] for place in places.values()) == tokens
    items = [json.loads(line) for line in output.with_suffix(".items.jsonl").read_text().splitlines()]
    assert sum(item["nats"] for item in items) == pytest.approx(nats, rel=1e-5)
    capsys.readouterr()
    assert main(command) == 2 and "finished report" in capsys.readouterr().err
    assert main(["eval", "text", str(run_directory)]) == 2 and "not one thing" in capsys.readouterr().err


@pytest.mark.slow
def test_spans_of_a_dataset_are_those_of_validation(run_directory: Path, data: Path, tmp_path: Path) -> None:
    output, dataset = tmp_path / "r.json", str(data / "dataset")
    assert main(["eval", "text", str(run_directory), "--data-path", dataset, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    with open_model(run_directory) as opened:
        expected = valid_losses(opened, read_manifest(data / "dataset"))
    assert report["tasks"].keys() == {"analysis", "final", "all"}
    for name in ("analysis", "final"):
        assert report["tasks"][name]["nats_per_token"] == pytest.approx(expected[f"loss/{name}"], rel=1e-5)
    tasks = report["tasks"]
    assert tasks["all"]["tokens"] == tasks["analysis"]["tokens"] + tasks["final"]["tokens"]
    assert report["suite"] == "text" and report["settings"]["split"] == "valid"
