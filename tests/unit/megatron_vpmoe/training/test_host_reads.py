"""How often a pass waits for the device does not grow with its micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.objectives import build_objective
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.training import evaluate, step
from tests.pretended_device import CARD, PretendedCard, lend
from tests.tiny import TINY, random_batch, tiny_config

_READS = {"item", "tolist", "__float__", "__int__", "__bool__", "cpu"}


class Reads(TorchFunctionMode):
    """Counts what brings a value from the card to the host."""

    def __init__(self, card: PretendedCard) -> None:
        super().__init__()
        self.card, self.names = card, list[str]()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS and self.card.holds(args[0]):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_pass_waits_once(single_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_config(num_experts=None)
    batches = [random_batch(2, TINY["seq_length"], TINY["padded_vocab_size"], seed=seed) for seed in range(5)]
    expected = evaluate.evaluate(build_model(cfg), build_objective(cfg), batches[:1]).keys()
    counted = []
    with lend(monkeypatch) as card:
        monkeypatch.setattr(step, "current_device", lambda: CARD)
        model, objective = build_model(cfg), build_objective(cfg)
        for count in (2, 5):
            with Reads(card) as reads:
                assert evaluate.evaluate(model, objective, batches[:count]).keys() == expected
            counted.append(reads.names)
    assert counted[0] == counted[1] == ["tolist"] * 2
    assert torch.distributed.is_initialized() and distributed.world_size() == 1
