"""A mixture's decoding step and forward pass: the share of each part; int8 weights, compiled steps, both; interleaved.

    python scripts/bench/mixture.py                                      # configs/think/mixture.yaml, untrained
    python scripts/bench/mixture.py --run runs/nano_think_mixture --data-path data/megatron/synth_kd_v1

All sides are of one process: in each round one after the other, in an order that rotates. A ratio is the seconds of the
plain fp32 model over those of another side, within a round, by the wall and by the process's CPU time. Only steps are
compiled; what the first one waits for that is printed (less where torch's cache on the disk has it). Shares are of the
fp32 side, by CPU time. With a run and datasets the nats a supervised token of fp32 and int8 over the same held-out
documents are printed first, and their difference with its 95 % interval over documents.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.data.batch import Span
from megatron_vpmoe.generation.compiled_step import compile_step
from megatron_vpmoe.generation.int8 import narrow_to_int8
from megatron_vpmoe.generation.state_decoder import StateDecoder, decoder_of
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.profiling.clock import parts_of
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.range_clock import RangeClock
from megatron_vpmoe.runtime.ranges import annotated, listening
from vpmoe.eval.open_model import Opened, open_model
from vpmoe.eval.suites.bootstrap import interval, resampled
from vpmoe.eval.suites.likelihood import measure
from vpmoe.eval.suites.text import Asked, passages_of

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "think" / "mixture.yaml"
CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}
FORMS = {"fp32": (False, False), "int8": (True, False), "compiled": (False, True), "compiled int8": (True, True)}
"""Of each side: whether its weights are int8, and whether its steps are compiled."""

Side = Callable[[], object]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a trained mixture")
    parser.add_argument("--config", type=Path, default=CONFIG, help="without --run: of what, with weights as drawn")
    parser.add_argument("--data-path", type=Path, nargs="+", default=[], help="with --run: held-out text is of these")
    parser.add_argument("--documents", type=int, default=40, help="of the valid split of each, the first")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--length", type=int, default=256, help="tokens of the forward pass, and before a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.data_path and args.run is None:
        parser.error("--data-path is to measure a --run on")
    return args


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


def shares(parts: Sequence[str], run: Side, rounds: int) -> str:
    """Of each part, in percent of all."""
    clock = RangeClock([*parts, "whole"], now=CLOCKS["CPU"])
    with listening(clock):
        for _ in range(rounds):
            with annotated("whole"):
                run()
    spent = clock.seconds
    whole = sum(spent.values())
    told = "  ".join(f"{part} {100 * spent.get(part, 0.0) / whole:.1f}" for part in parts)
    return f"{told}  rest {100 * spent.get('whole', 0.0) / whole:.1f} %, {1e3 * whole / rounds:.2f} ms"


def losses(own: Opened, narrow: Opened, folder: Path, documents: int) -> str:
    """Of both over the first documents of a valid split."""
    manifest = read_manifest(folder)
    own.require_vocabulary(manifest)
    asked = Asked(data_path=folder, documents=documents)
    passages, _ = passages_of(own.tokenizer, manifest, asked, None)
    # float64 [3, D]: nats, tokens and bytes of each document.
    first, second = (
        measure(one.model, passages, batch_size=asked.batch_size, spans=len(Span)).documents.sum(-1)
        for one in (own, narrow)
    )
    (nats, tokens, _), (other, _, _) = (each[:, first[1] > 0] for each in (first, second))
    drawn = resampled(np.stack([other - nats, tokens]), str(folder))
    low, high = interval(drawn[:, 0] / drawn[:, 1])
    mean, more = (each.sum() / tokens.sum() for each in (nats, other - nats))
    of_what = f"{tokens.sum():,.0f} supervised tokens of {len(tokens)} held-out documents"
    return f"{folder}, {of_what}: {mean:.5f} nats a token, int8 {more:+.5f} (95 %: {low:+.5f} to {high:+.5f})"


def compare(sides: dict[str, Side], rounds: int) -> Iterator[str]:
    """By each clock the ratios of the first side's time to the others'."""
    taken = {clock: {name: [] for name in sides} for clock in CLOCKS}
    names = list(sides)
    for number in range(-1, rounds):  # the first round warms up
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = {clock: now() for clock, now in CLOCKS.items()}
            sides[name]()
            for clock, now in CLOCKS.items():
                taken[clock][name] += [now() - began[clock]] if number >= 0 else []
    for clock, of in taken.items():
        first = of[names[0]]
        yield f"{clock}: {names[0]} {1e3 * statistics.median(first):.2f} ms"
        for name in names[1:]:
            ratios = [one / other for one, other in zip(first, of[name], strict=True)]
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            told = f"{1e3 * statistics.median(of[name]):.2f} ms, ratio {low:.2f} / {middle:.2f} / {high:.2f}"
            yield f"{clock}: {name} {told} (min / median / max)"


@contextlib.contextmanager
def models_of(args: argparse.Namespace) -> Iterator[tuple[RunConfig, dict[str, VPModel]]]:
    """Configuration, and the model in each form; what int8 changes in size or losses is printed."""
    if args.run is not None:
        with contextlib.ExitStack() as stack:
            opened = {
                name: stack.enter_context(open_model(args.run, bf16=False, int8=int8, compiled=compiled))
                for name, (int8, compiled) in FORMS.items()
            }
            for folder in args.data_path:
                print(losses(opened["fp32"], opened["int8"], folder, args.documents), flush=True)
            yield opened["fp32"].cfg, {name: one.model for name, one in opened.items()}
        return
    cfg = load_config(args.config, ["--no-bf16", "--padded-vocab-size", "32000", "--load-experts", "null"])
    with distributed.single_process(seed=1):
        models = {name: build_model(cfg).eval() for name in FORMS}
        for name, (int8, compiled) in FORMS.items():
            models[name].load_state_dict(models["fp32"].state_dict())
            if int8:
                told = narrow_to_int8(models[name])
                sizes = f"{told.before / 2**20:.1f} MiB of weights become {told.after / 2**20:.1f}"
                print(f"{name}: {told.layers} linear layers; {sizes}")
            if compiled:
                compile_step(models[name])
        yield cfg, models


@torch.no_grad()
def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    with models_of(args) as (cfg, models):
        print(f"{args.threads} threads, {args.rounds} rounds, load {os.getloadavg()[0]:.1f}")
        parts = (*parts_of(cfg), "head")
        for rows in args.rows:
            sides = {name: step_of(model, rows, args.length) for name, model in models.items()}
            report(f"step of {rows} rows", sides, parts, args.rounds)
        whole = {name: forward_of(models[name], args.length) for name in ("fp32", "int8")}
        report(f"forward pass of {args.length} tokens", whole, parts, args.rounds)


def report(case: str, sides: dict[str, Side], parts: Sequence[str], rounds: int) -> None:
    """Print what a case takes."""
    for name, run in sides.items():
        began = time.perf_counter()
        run()
        if name.startswith("compiled"):
            print(f"{case}, {name}: the first took {time.perf_counter() - began:.1f} s", flush=True)
    for line in compare(sides, rounds):
        print(f"{case}, {line}", flush=True)
    print(f"{case}, shares: {shares(parts, sides['fp32'], rounds)}", flush=True)


if __name__ == "__main__":
    main()
