"""Tokens per second: of steps that the device has finished, and of nothing else; FLOPs of the model, counted once."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_vpmoe.config import forward_flops_per_token, layer_geometries, training_flops_per_token
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.optim import build_optimizer
from megatron_vpmoe.optim.normuon import NorMuon
from megatron_vpmoe.optim.polar_express import polar_express_flops
from megatron_vpmoe.runtime import device as runtime_device
from megatron_vpmoe.training.throughput import Throughput
from tests.tiny import random_batch, tiny_config


class Device:
    """A clock, and a GPU that is still busy for ``behind`` seconds when the calls to it have returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.behind = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", self.finish)

    def work(self, calls: float, device: float) -> None:
        """Seconds that the calls take, and seconds that the device needs after them."""
        self.now, self.behind = self.now + calls, self.behind + device

    def finish(self) -> None:
        self.now, self.behind = self.now + self.behind, 0.0


@pytest.mark.usefixtures("single_process")
def test_the_clock_stops_when_the_device_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = Throughput(tiny_config(bf16=False))
    device = Device(monkeypatch)
    batches = [random_batch(2, 24, 60, seed=1)]
    throughput.restart()
    for _ in range(3):
        device.work(calls=0.5, device=1.5)
        throughput.step(1000, batches)
        device.work(calls=0.25, device=4)  # a validation pass
        throughput.restart()
    assert throughput.report()["throughput/tokens_per_second"] == pytest.approx(500)


@pytest.mark.usefixtures("single_process")
def test_mfu_is_of_the_model_s_flops_in_real_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding does nothing, nor does the output layer where no loss is asked; a token sees the keys of its own
    document; NorMuon's products are told apart.
    """
    cfg, device = tiny_config(), Device(monkeypatch)
    batch = random_batch(2, cfg.data.seq_length, cfg.model.padded_vocab_size, seed=1)
    seen = (batch.position_ids + 1)[batch.document_id >= 0]
    assert len(seen) < batch.tokens.numel() and seen.max() > (cfg.model.window_size or 0)
    monkeypatch.setattr(runtime_device, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(runtime_device, "has_gpu", lambda: False)
    throughput = Throughput(cfg.model_copy(update={"training": cfg.training.model_copy(update={"bf16": True})}), 989e12)
    throughput.restart()
    device.work(calls=2.0, device=0.0)
    throughput.step(len(seen), [batch])
    found = throughput.report()
    pairs = {None: int(seen.sum()), cfg.model.window_size: int(seen.clamp(max=cfg.model.window_size).sum())}
    of_keys = 3 * sum(layer.flops_per_key * pairs[layer.window] for layer in layer_geometries(cfg))
    unread = len(seen) - int(batch.loss_mask.sum())
    assert 0 < unread < len(seen)
    flops = training_flops_per_token(cfg, keys=lambda _: 0.0) * len(seen) + of_keys
    flops -= 3 * 2 * cfg.model.padded_vocab_size * cfg.model.hidden_size * unread
    assert found["throughput/model_tflops"] == pytest.approx(flops / 2 / 1e12)
    assert found["throughput/mfu_pct"] == pytest.approx(100 * flops / 2 / 989e12)
    assert found["throughput/normuon_pct"] == pytest.approx(50)
    assert flops / len(seen) < training_flops_per_token(cfg) == 3 * forward_flops_per_token(cfg)


@pytest.mark.usefixtures("single_process")
def test_a_card_without_a_stated_peak_has_no_mfu_and_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Throughput(tiny_config()).note is None  # a CPU has no peak that anybody states
    monkeypatch.setattr(runtime_device, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card")
    assert "Some Card" in (Throughput(tiny_config(bf16=True)).note or "")


@pytest.mark.usefixtures("single_process")
def test_normuon_s_products_are_those_of_its_matrices() -> None:
    cfg = tiny_config()
    optimizer = build_optimizer([build_model(cfg)], cfg)
    sizes = []
    for normuon in (member.optimizer for member in optimizer.members if isinstance(member.optimizer, NorMuon)):
        places = tuple((g, i) for g, group in enumerate(normuon.param_groups) for i in range(len(group["params"])))
        layouts = [normuon._layouts[g][i] for g, i in places]
        leaves = [normuon.param_groups[g]["params"][i] for g, i in places]
        params = [layout.unfused(leaf) for layout, leaf in zip(layouts, leaves, strict=True)]
        sizes += [(stack.rows, stack.cols, stack.count) for stack in normuon._stacks(places, params, layouts)]
    least = sum(count * min(polar_express_flops(r, c, 5, form) for form in ("gram", "direct")) for r, c, count in sizes)
    most = sum(count * polar_express_flops(r, c) for r, c, count in sizes)
    assert 0 < least <= optimizer.normuon_flops() <= most
