"""Time and memory of rung 3's calibrated conversion at full size, from a few layers of random weights and tokens.

Two runs, one with twice the steps of the other, tell the seconds of a step from those of everything else; both are
divided by the layers. Time is CPU time of the process, so that other processes on the machine count less.

    python scripts/bench/calibrated_shape.py --layers 1 --tokens 4096 --steps 40
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from megatron_vpmoe.runtime.device import prepare

prepare()

from megatron_vpmoe.config import RunConfig, load_config  # noqa: E402
from vpmoe.upcycle.passages import Passages  # noqa: E402
from vpmoe.upcycle.shape import convert_blocks  # noqa: E402
from vpmoe.upcycle.shape_settings import ShapeSettings  # noqa: E402
from vpmoe.weights.geometry import expected_shapes  # noqa: E402
from vpmoe.weights.tensors import LazyTensor, random_prompts  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default="configs/qwen3_0_6b_o200k.yaml")
    parser.add_argument("--new", default="configs/vpdense0_5_28.yaml")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vocabulary = 1024  # of the texts; the embedding of a whole vocabulary is held for a moment only
    flags = ["--num-layers", str(options.layers), "--padded-vocab-size", str(vocabulary)]
    old, new = (load_config(path, flags) for path in (options.old, options.new))
    texts = random_prompts(vocabulary, [options.text_tokens] * (options.tokens // options.text_tokens), 0)
    passages = Passages.of_texts(texts)
    _seconds(old, new, passages, 1)  # the first run loads libraries and memory
    once, twice = (_seconds(old, new, passages, steps) / options.layers for steps in (options.steps, 2 * options.steps))
    step = (twice - once) / options.steps
    print(f"a layer, {passages.num_tokens} tokens, CPU seconds, {options.threads} threads:")
    print(f"  a step of both blocks, on {ShapeSettings.model_fields['batch_tokens'].default} tokens: {step:.2f}")
    print(f"  everything else: {once - options.steps * step:.1f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


def _seconds(old: RunConfig, new: RunConfig, passages: Passages, steps: int) -> float:
    settings = ShapeSettings(calibration_texts=["-"], texts=["--"], steps=steps)
    with tempfile.TemporaryDirectory() as scratch:
        started = time.process_time()
        convert_blocks(
            (old, _weights(old)),
            new,
            settings,
            passages,
            Path(scratch),
            source="random weights",
            progress=lambda what, size: print(f"  {steps} steps: {what}", flush=True),
        )
        return time.process_time() - started


def _weights(cfg: RunConfig) -> dict[str, LazyTensor]:
    """Norms of ones and matrices of rows of length 1, the same on each read."""

    def value(number: int, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape)
        return torch.randn(shape, generator=torch.Generator().manual_seed(number)) * shape[-1] ** -0.5

    shapes = expected_shapes(cfg)
    return {
        name: LazyTensor(shape, torch.float32, lambda number=number, shape=shape: value(number, shape))
        for number, (name, shape) in enumerate(shapes.items())
    }


if __name__ == "__main__":
    main()
