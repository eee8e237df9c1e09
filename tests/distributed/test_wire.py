"""What two processes send in a step, and when: gradients while the backward pass runs, weights during the update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import TINY, random_batch, rows_of, tiny_config
from tests.workers import run_workers

RANKS, ROWS = 2, TINY["global_batch_size"]


def watched_step(options: dict[str, Any]) -> dict[str, Any]:
    """Steps in small buckets; of the last one what happened in which order, and what was sent."""
    from unittest import mock

    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_vpmoe.config import buffers
    from megatron_vpmoe.model.builder import build_model, wrap_for_training
    from megatron_vpmoe.objectives import build_objective
    from megatron_vpmoe.optim import build_optimizer
    from megatron_vpmoe.runtime import distributed
    from megatron_vpmoe.training.step import train_step

    cfg = tiny_config(micro_batch_size=1, **options)
    distributed.initialize(seed=7)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    model = build_model(cfg)
    with mock.patch.dict(buffers.BUCKET_BYTES, cpu=64 * 2**10):
        wrapped = wrap_for_training(model, cfg)
    optimizer, objective = build_optimizer([wrapped], cfg), build_objective(cfg)
    share, events, sent = ROWS // size, [], []
    whole = random_batch(ROWS, TINY["seq_length"], TINY["padded_vocab_size"], seed=0)
    batches = [rows_of(whole, i, i + 1) for i in range(rank * share, (rank + 1) * share)]

    def noted(name: str, call: Any) -> Any:
        def collective(*tensors: torch.Tensor, **keywords: Any) -> Any:
            # What a rank gives away: all but its own slice, or its own slice to every other.
            part = min(tensor.nbytes for tensor in tensors)
            events.append(name)
            sent.append((name, part * (keywords["group"].size() - 1)))
            return call(*tensors, **keywords)

        return collective

    model.embedding.word_embeddings.weight.register_hook(lambda _: events.append("embedding"))
    for member in optimizer.members:
        member.optimizer.register_step_post_hook(lambda *_: events.append("updated"))
    patches = [
        mock.patch.object(dist, name, noted(name, getattr(dist, name)))
        for name in ("reduce_scatter_single", "all_gather_single")
    ]
    with patches[0], patches[1]:
        for _ in range(2):
            events.clear()
            sent.clear()
            train_step(wrapped, optimizer, objective, batches)
    buckets = [
        (bucket.buckets[0].grad_data.numel(), sum(p.numel() for p in bucket.params), p.element_size())
        for bucket in wrapped.sharded_buckets
        for p in [bucket.buckets[0].params_list[0]]
    ]
    views = all(
        weights is not None and 0 <= p.data_ptr() - weights.data_ptr() < weights.nbytes
        for bucket in wrapped.sharded_buckets
        for weights in [bucket.buckets[0].param_data]
        for p in bucket.params
    )
    distributed.shutdown()
    return {"events": events, "sent": sent, "buckets": buckets, "views": views}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("design", ["moe", "dense"])
def test_each_bucket_is_reduced_and_gathered_once(design: str, bf16: bool, tmp_path: Path) -> None:
    """Of N ranks each gives (N - 1) / N of the fp32 gradients, and as much of the weights in their own dtype."""
    options = {"bf16": bf16, **({"num_experts": None} if design == "dense" else {})}
    for result in run_workers(RANKS, watched_step, options, folder=tmp_path):
        events, buckets = result["events"], result["buckets"]
        assert len(buckets) >= 2 and result["views"]
        wanted = {
            "reduce_scatter_single": sum(4 * size // RANKS * (RANKS - 1) for size, _, _ in buckets),
            "all_gather_single": sum(width * size // RANKS * (RANKS - 1) for size, _, width in buckets),
        }
        for name, of_all in wanted.items():
            assert sum(size for each, size in result["sent"] if each == name) == of_all
            assert events.count(name) == len(buckets)
        assert sum(size for size, _, _ in buckets) <= 1.1 * sum(elements for _, elements, _ in buckets)
        if design == "dense":  # whose matrices are too few for two buckets
            continue
        # Micro-batches before the last send nothing; in the last one most is sent before the pass is through.
        of_last = events[len(events) - events[::-1].index("embedding") - 1 :]
        before = len([1 for event in events if event == "reduce_scatter_single"]) - of_last.count(
            "reduce_scatter_single"
        )
        assert before >= 2
        last_update = len(events) - 1 - events[::-1].index("updated")
        assert events[:last_update].count("all_gather_single") >= 2
        assert events.index("all_gather_single") > events.index("reduce_scatter_single")
