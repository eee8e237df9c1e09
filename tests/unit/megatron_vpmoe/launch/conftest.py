"""A run small enough to start in a test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def run_yaml(tmp_path: Path, repository: Path) -> Path:
    """A configuration of two processes, whose dataset directory is empty."""
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    path = tmp_path / "run.yaml"
    path.write_text(
        f"extends: {repository / 'configs' / 'nano' / 'stage1.yaml'}\n"
        "model: {padded_vocab_size: 512, window_size: 16}\n"
        f"data: {{seq_length: 64, data_path: {dataset}}}\n"
        "parallel: {nproc_per_node: 2}\n"
        f"training: {{micro_batch_size: 1, global_batch_size: 4, run_dir: {tmp_path / 'run'}}}\n"
    )
    return path
