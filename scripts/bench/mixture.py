"""A mixture's decoding step and forward pass: the share of each part, and int8 weights against its own; interleaved.

    python scripts/bench/mixture.py                                      # configs/think/mixture.yaml, untrained
    python scripts/bench/mixture.py --run runs/nano_think_mixture --data-path data/megatron/synth_mini

Both sides are of one process: in each round one after the other, in an order that rotates. A ratio is the seconds of
fp32 weights over those of int8 weights, within a round, by the wall and by the process's CPU time. Shares are of the
fp32 side by CPU-bound wall time (`runtime/range_clock.py`). With a run and a dataset the losses of both over its valid
split are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_vpmoe.config import load_config
from megatron_vpmoe.generation.int8 import narrow_to_int8
from megatron_vpmoe.generation.state_decoder import StateDecoder, decoder_of
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.range_clock import RangeClock
from megatron_vpmoe.runtime.ranges import annotated, listening
from vpmoe.eval.open_model import open_model
from vpmoe.eval.valid_split import valid_losses

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "think" / "mixture.yaml"
CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}
Side = Callable[[], object]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a trained mixture")
    parser.add_argument("--data-path", type=Path, help="with --run: a dataset whose valid split tells the losses")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--length", type=int, default=256, help="tokens of the forward pass, and before a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def step_of(model: VPModel, rows: int, length: int) -> Side:
    """One new token a row, behind so many."""
    decoder = decoder_of(model, packed=False)
    assert isinstance(decoder, StateDecoder)
    cache = decoder.cache(rows)
    cache.reserve(length + 1)
    token, position = torch.arange(rows), torch.full((rows,), length)
    return lambda: decoder.step(token, position, cache, length + 1)


def forward_of(model: VPModel, length: int) -> Side:
    """One text, with all logits."""
    ids = torch.arange(length)[None] % model.vocab_size

    def forward() -> object:
        layout = SequenceLayout(torch.zeros_like(ids, dtype=torch.int32), torch.arange(length)[None])
        return model.logits(model(ids, layout).hidden_BSH)

    return forward


def shares(model: VPModel, run: Side, rounds: int) -> str:
    """Of each part, in percent of all."""
    parts = ["latent_attention", "router", *(f"experts.{name}" for name in model.decoder.experts), "adapters", "head"]
    clock = RangeClock([*parts, "whole"])
    logits = model.logits

    def marked(hidden: torch.Tensor) -> torch.Tensor:
        with annotated("head"):
            return logits(hidden)

    model.logits = marked  # type: ignore[method-assign]
    try:
        with listening(clock):
            for _ in range(rounds):
                with annotated("whole"):
                    run()
    finally:
        del model.logits
    spent = clock.seconds
    whole = sum(spent.values())
    told = "  ".join(f"{part} {100 * spent.get(part, 0.0) / whole:.1f}" for part in parts)
    return f"{told}  rest {100 * spent.get('whole', 0.0) / whole:.1f} %, {1e3 * whole / rounds:.2f} ms"


def compare(sides: dict[str, Side], rounds: int) -> Iterator[str]:
    """By each clock the ratio of the first side's time to the second's."""
    taken = {clock: {name: [] for name in sides} for clock in CLOCKS}
    for number in range(-1, rounds):  # the first round warms up
        for name in list(sides)[:: 1 if number % 2 else -1]:
            began = {clock: now() for clock, now in CLOCKS.items()}
            sides[name]()
            for clock, now in CLOCKS.items():
                taken[clock][name] += [now() - began[clock]] if number >= 0 else []
    for clock, of in taken.items():
        first, second = of.values()
        ratios = [one / other for one, other in zip(first, second, strict=True)]
        middle = ", ".join(f"{name} {1e3 * statistics.median(own):.2f} ms" for name, own in of.items())
        low, high = min(ratios), max(ratios)
        yield f"{clock}: ratio {low:.2f} / {statistics.median(ratios):.2f} / {high:.2f} (min / median / max), {middle}"


@contextlib.contextmanager
def both(args: argparse.Namespace) -> Iterator[tuple[VPModel, VPModel]]:
    """The same model twice, and what has become of the second is printed; with a dataset the losses too."""
    if args.run is not None:
        with open_model(args.run, bf16=False) as own, open_model(args.run, bf16=False, int8=True) as narrow:
            yield own.model, narrow.model
            if args.data_path is not None:
                losses = [valid_losses(one, read_manifest(args.data_path)) for one in (own, narrow)]
                for name, value in losses[0].items():
                    print(f"{name}: {value:.5f}, with int8 weights {losses[1][name]:.5f}")
        return
    cfg = load_config(CONFIG, ["--no-bf16", "--padded-vocab-size", "32000", "--load-experts", "null"])
    with distributed.single_process(seed=1):
        model, narrow = build_model(cfg).eval(), build_model(cfg).eval()
        narrow.load_state_dict(model.state_dict())
        told = narrow_to_int8(narrow)
        print(f"{told.layers} linear layers; {told.before / 2**20:.1f} MiB of weights become {told.after / 2**20:.1f}")
        yield model, narrow


@torch.no_grad()
def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    with both(args) as (own, narrow):
        print(f"{args.threads} threads, {args.rounds} rounds, load {os.getloadavg()[0]:.1f}")
        cases: dict[str, Callable[[VPModel], Side]] = {
            f"step of {rows} rows": lambda model, rows=rows: step_of(model, rows, args.length) for rows in args.rows
        }
        cases[f"forward pass of {args.length} tokens"] = lambda model: forward_of(model, args.length)
        for case, side_of in cases.items():
            sides = {"fp32": side_of(own), "int8": side_of(narrow)}
            for line in compare(sides, args.rounds):
                print(f"{case}, {line}", flush=True)
            print(f"{case}, shares: {shares(own, sides['fp32'], args.rounds)}", flush=True)


if __name__ == "__main__":
    main()
