"""A deterministic run: what it sets, what it refuses, and that it is all taken back with the process groups."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.runtime import determinism, distributed
from tests.tiny import tiny_config

NAMES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set is taken back after the test."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_torch_and_its_compiler_and_libraries_are_told_for_as_long_as_the_groups_exist() -> None:
    from torch._inductor import config

    distributed.shutdown()
    distributed.initialize(seed=1, deterministic=True)
    try:
        assert torch.are_deterministic_algorithms_enabled() and config.deterministic  # type: ignore[attr-defined]
        assert [os.environ[name] for name in NAMES] == [":4096:8", "0"]
        model = build_model(tiny_config(deterministic=True))
        # Upstream's lookup, whose derivative else adds rows up in any order.
        assert model.embedding.word_embeddings.deterministic_mode
    finally:
        distributed.shutdown()
    assert not torch.are_deterministic_algorithms_enabled() and not config.deterministic  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "value"), [(NAMES[0], ":0:0"), (NAMES[1], "1")])
def test_an_environment_that_says_otherwise_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match=f"{name}={value}"):
        determinism.repeat_bit_for_bit()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_the_environment_allows_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAMES[0], ":16:8")
    determinism.repeat_bit_for_bit()
    determinism.as_before()
    assert os.environ[NAMES[0]] == ":16:8"
