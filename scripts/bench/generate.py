"""Generation against transformers' `generate`: the same weights, exported, in one process, and the ratio of the times.

Prompts and answers have mixed lengths. Both sides are asked greedily for the same number of new tokens of each prompt:
ours gets it as each prompt's limit, transformers as a stopping criterion of each row, in batches that pad prompts on
the left and go on until the longest answer is done. Every round times both, one after the other, in turns which is
first; the ratio is transformers' time over ours, within the round, by the wall and by the process's CPU time, which
other jobs on the machine disturb less. How many answers are equal is told as well.

    python scripts/bench/generate.py

`nano` is configs/nano/stage1.yaml, `dense` a Qwen3 of 50 M parameters, 16 layers of 512; both untrained.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.prompts import Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime import distributed
from vpmoe.hf.convert import write_hf_directory
from vpmoe.weights.megatron_checkpoint import write_checkpoint
from vpmoe.weights.tensors import LazyTensor

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "nano"
DENSE = "--num-layers 16 --hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 --num-query-groups 4"
MODELS = {"nano": ("stage1.yaml", ""), "dense": ("qwen3_o200k.yaml", f"{DENSE} --kv-channels 64")}

Asked = list[tuple[list[int], int]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--batches", type=int, default=4, help="prompts are so many times the batch")
    parser.add_argument("--prompt", type=int, nargs=2, default=(16, 160), help="shortest and longest, in tokens")
    parser.add_argument("--answer", type=int, nargs=2, default=(8, 256), help="shortest and longest, in tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def questions(args: argparse.Namespace, count: int, vocabulary: int) -> Asked:
    """Prompts, and how many tokens each is to be answered with; lengths between the limits, short ones more often."""
    generator = torch.Generator().manual_seed(count)

    def length(limits: tuple[int, int]) -> int:
        return limits[0] + int((limits[1] - limits[0]) * float(torch.rand((), generator=generator)) ** 2)

    return [
        (torch.randint(0, vocabulary, (length(args.prompt),), generator=generator).tolist(), length(args.answer))
        for _ in range(count)
    ]


def ours(model: VPModel, asked: Asked, batch: int) -> list[list[int]]:
    prompts = [Prompt(ids, max_new_tokens=count) for ids, count in asked]
    options = SamplingOptions(max(count for _, count in asked), ())
    return [one.ids for one in generate(model, prompts, options, rows=batch)]


def theirs(model: Any, asked: Asked, batch: int) -> list[list[int]]:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Limits(StoppingCriteria):
        def __init__(self, ends: torch.Tensor) -> None:
            self.ends = ends

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] >= self.ends

    answers = []
    for begin in range(0, len(asked), batch):
        some = asked[begin : begin + batch]
        longest = max(len(ids) for ids, _ in some)
        rows = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in some])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in some])
        ends = torch.tensor([longest + count for _, count in some])
        told = model.generate(
            rows,
            attention_mask=mask,
            max_new_tokens=max(count for _, count in some),
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([Limits(ends)]) if len(some) > 1 else None,
        )
        answers += [row[longest : longest + count].tolist() for row, (_, count) in zip(told, some, strict=True)]
    return answers


def exported(model: VPModel, cfg: RunConfig, folder: Path) -> Any:
    """The model as transformers opens it."""
    from transformers import AutoModelForCausalLM

    weights = {name: LazyTensor.of(value) for name, value in model.state_dict().items() if "_extra_state" not in name}
    state = {"config": cfg.model_dump(mode="json"), "iteration": 0}
    checkpoint, _ = write_checkpoint(folder / "checkpoint", weights, state)
    (folder / "hf").mkdir()
    write_hf_directory(checkpoint, folder / "hf")
    return AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, trust_remote_code=True).eval()


def measure(args: argparse.Namespace, name: str, folder: Path) -> None:
    file, flags = MODELS[name]
    cfg = load_config(CONFIGS / file, flags.split())
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter *= 3  # tokens vary
    hf = exported(model, cfg, folder)
    size = sum(parameter.numel() for parameter in model.parameters())
    for batch in args.batch:
        asked = questions(args, args.batches * batch, cfg.model.padded_vocab_size)
        sides: list[Callable[[], list[list[int]]]] = [
            lambda b=batch, a=asked: ours(model, a, b),
            lambda b=batch, a=asked: theirs(hf, a, b),
        ]
        first, second = (side() for side in sides)
        same = sum(one == other for one, other in zip(first, second, strict=True))
        tokens = sum(count for _, count in asked)
        clocks = {"wall": time.perf_counter, "CPU": time.process_time}
        seconds = {clock: ([], []) for clock in clocks}
        for turn in range(args.rounds):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                begin = {clock: now() for clock, now in clocks.items()}
                sides[side]()
                for clock, now in clocks.items():
                    seconds[clock][side].append(now() - begin[clock])
        print(
            f"{name} ({size / 1e6:.1f} M), batch {batch}: {len(asked)} prompts, {tokens} new tokens, "
            f"{same} answers equal, load {os.getloadavg()[0]:.1f}"
        )
        for clock, (one, other) in seconds.items():
            ratios = sorted(slow / fast for fast, slow in zip(one, other, strict=True))
            print(
                f"    {clock} time: ratio {ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f} "
                f"(min / median / max), {tokens / statistics.median(one):.0f} against "
                f"{tokens / statistics.median(other):.0f} tokens a second",
                flush=True,
            )


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    with distributed.single_process(seed=1):
        for name in args.models:
            with tempfile.TemporaryDirectory() as folder:
                measure(args, name, Path(folder))


if __name__ == "__main__":
    main()
