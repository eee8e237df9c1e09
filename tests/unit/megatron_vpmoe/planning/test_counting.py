"""What single operations count as, and what a card on paper refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vpmoe.planning.card import CARD, fake_mode, on_paper
from megatron_vpmoe.planning.counting import Counting
from megatron_vpmoe.planning.counts import Counts
from megatron_vpmoe.planning.kernels import Cost

ROWS = 24


@pytest.fixture
def counting() -> Iterator[Counting]:
    counting = Counting(fake_mode(), ROWS, lambda mask: mask.numel() // 2)
    with on_paper("H100", 80 * 2**30, 8, counting):
        yield counting


def on_card(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=CARD)


def test_decisions_are_a_gpus(counting: Counting) -> None:
    here, there = torch.zeros(2), on_card(2)
    assert torch.cuda.is_available() and there.is_cuda and not there.is_cpu and there.device == CARD
    assert here.is_cpu and not here.is_cuda and (here + 1).tolist() == [1, 1]
    assert (there + 1).device == CARD and torch.zeros_like(there).is_cuda and there.new_ones(3).is_cuda
    assert counting.counts.total(name="add") == Cost(1, 0, 4, 4)  # the host's own sum is nobody's kernel


def test_products_and_views(counting: Counting) -> None:
    left, right = on_card(8, 16), on_card(16, 4)
    (left @ right).t().view(4, 8).narrow(0, 0, 2).detach()
    assert counting.counts.total() == Cost(1, 2 * 8 * 16 * 4, 2 * (8 * 16 + 16 * 4), 2 * 8 * 4)
    experts, rows = on_card(3, 4, 16), on_card(ROWS, 16)
    functional.grouped_mm(rows, experts.transpose(1, 2), offs=on_card(3, dtype=torch.int32))
    assert counting.counts.total(name="_grouped_mm bfloat16").flops == 2 * ROWS * 16 * 4


def test_a_repeated_element_is_read_once(counting: Counting) -> None:
    on_card(1, 16).expand(8, 16) + on_card(8, 1)
    assert counting.counts.total() == Cost(1, 0, 2 * (16 + 8), 2 * 8 * 16)


def test_a_lookup_reads_its_rows(counting: Counting) -> None:
    functional.embedding(on_card(4, dtype=torch.int64), on_card(1000, 16))
    assert counting.counts.total() == Cost(1, 0, 2 * 4 * 16 + 8 * 4, 2 * 4 * 16)


def test_many_tensors_in_one_call(counting: Counting) -> None:
    torch._foreach_mul_([on_card(4) for _ in range(111)], 2.0)
    assert counting.counts.total() == Cost(2, 0, 111 * 8, 111 * 8)


def test_a_fused_update_is_few_calls(counting: Counting) -> None:
    params = [torch.nn.Parameter(on_card(100, dtype=torch.float32)) for _ in range(70)]
    for param in params:
        param.grad = on_card(100, dtype=torch.float32)
    torch.optim.AdamW(params, fused=True).step()
    found = counting.counts.total(name="_fused_adamw")
    # CUDA's kernel takes 36 parameters at a time; it reads weight, gradient, two moments and a count, and writes three.
    assert found == Cost(2, 0, 70 * 4 * (4 * 100 + 1), 70 * 4 * 3 * 100)


@pytest.fixture
def ranks() -> Iterator[int]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield 8
    dist.destroy_process_group()


def test_a_rank_gives_what_is_its_own(ranks: int, counting: Counting) -> None:
    one, two, all_of_one = on_card(4), on_card(2), on_card(32)
    dist.all_reduce(one)
    dist.all_reduce_coalesced([one, two])
    dist.all_gather_into_tensor(all_of_one, one)
    dist.reduce_scatter_tensor(one, all_of_one)
    dist.all_to_all_single(all_of_one, all_of_one.clone())
    assert not counting.counts.syncs
    dist.barrier()
    assert sum(counting.counts.syncs.values()) == 1
    given = {name: given for (_, name, of), (_, given) in counting.counts.collectives.items() if of == ranks}
    assert given == {
        "allreduce": 8, "allreduce_coalesced": 12, "_allgather_base": 8, "_reduce_scatter_base": 64,
        "alltoall_base": 64, "barrier": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "ask",
    [
        Tensor.item,
        Tensor.tolist,
        Tensor.cpu,
        bool,
        torch.nonzero,
        lambda x: x.to("cpu"),
        lambda x: on_card(*x.shape)[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.tensor([1.0], device=CARD),
        lambda x: torch.zeros(3).to(CARD),
        lambda x: torch.zeros(3).to(CARD, non_blocking=True),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.segment_reduce(x.float(), "sum", lengths=x.long()),
    ],
)
def test_the_host_waits(counting: Counting, ask: object) -> None:
    ask(on_card(1))  # type: ignore[operator]
    assert sum(counting.counts.syncs.values()) == 1


def test_the_host_goes_on(counting: Counting) -> None:
    there = torch.zeros(3).pin_memory().to(CARD, non_blocking=True)
    there[there > 0] = 0.0
    torch.where(there > 0, there, 0)
    there.to("cpu", non_blocking=True)
    assert not counting.counts.syncs


def test_what_is_asked_is_made_up(counting: Counting) -> None:
    assert on_card(4, dtype=torch.int64).tolist() == [ROWS // 4] * 4
    assert on_card(2, dtype=torch.float32).cpu().tolist() == [1.0, 1.0]


def test_devices_do_not_mix(counting: Counting) -> None:
    assert (on_card(3) * torch.tensor(2.0)).is_cuda  # a number may come from the host
    with pytest.raises(AssertionError, match="FakeTensor"):
        on_card(3) + torch.zeros(3)


def test_the_backward_pass_counts_for_its_part(counting: Counting) -> None:
    x = on_card(8, 16).requires_grad_()
    counting.ranges.enter("forward")
    counting.ranges.enter("experts")
    y = functional.rms_norm(x, (16,), on_card(16), 1e-6) @ on_card(16, 4)
    counting.ranges.leave("experts")
    loss = y.sum()
    counting.ranges.leave("forward")
    counting.ranges.enter("backward")
    loss.backward()
    counting.ranges.leave("backward")
    assert counting.counts.total("forward", "experts").launches == 2  # one kernel norms
    assert counting.counts.total("backward", "experts").flops == 2 * 8 * 16 * 4
    assert x.grad is not None and x.grad.is_cuda


def test_memory_goes_with_its_last_user(counting: Counting) -> None:
    kept = on_card(1024)
    counting.label([kept], "weights")
    gone = on_card(2048)
    del gone
    on_card(16)
    assert counting.counts.peaks == {"other": {"weights": 2 * 1024, "other": 2 * 2048}}
    assert counting.counts.peak == 2 * 3072


def test_counts_are_stored(counting: Counting) -> None:
    (on_card(8, 16) @ on_card(16, 4)).sum().item()
    assert Counts.from_json(counting.counts.to_json()) == counting.counts
