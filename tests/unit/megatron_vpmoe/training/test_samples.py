"""samples.jsonl: texts may hold any character, and a kill at any moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.training.samples import SampleWriter
from tests.fixtures_dataset import small_dataset
from tests.tiny import tiny_config

ODD = "line\u2028separator\u0085next\x0cpage"


def line(step: int, text: str = ODD) -> str:
    return json.dumps({"step": step, "prompt": text, "completion": text}, ensure_ascii=False) + "\n"


def opened(tmp_path: Path, resume_step: int) -> list[dict]:
    cfg = tiny_config(data_path=small_dataset(tmp_path / "set"), sample_prompts=1)
    manifest = read_manifest(tmp_path / "set")
    dataset = KDDataset(manifest, "valid", seq_length=48)
    SampleWriter(dataset, cfg, tmp_path / "samples.jsonl", resume_step=resume_step)
    return [json.loads(kept) for kept in (tmp_path / "samples.jsonl").read_text().split("\n") if kept]


def test_a_run_resumes_after_samples_with_any_character(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(line(1) + line(2) + line(3), encoding="utf-8")
    assert [(sample["step"], sample["prompt"]) for sample in opened(tmp_path, 2)] == [(1, ODD), (2, ODD)]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_is_no_line(tmp_path: Path, cut: int) -> None:
    content = (line(1) + line(2)).encode()
    (tmp_path / "samples.jsonl").write_bytes(content[:-cut])
    assert [sample["step"] for sample in opened(tmp_path, 2)] == [1]


@pytest.mark.parametrize("broken", ["{not json}\n", "[]\n", '{"prompt": "x"}\n', "\udcff\n"])
def test_a_broken_line_is_named_and_nothing_is_lost(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "samples.jsonl"
    content = line(1).encode() + broken.encode(errors="surrogateescape") + line(2).encode()
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"samples\.jsonl:2"):
        opened(tmp_path, 5)
    assert path.read_bytes() == content
