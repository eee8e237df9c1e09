"""What each way of rung 3 loses, over several trained models: nats a token on held-out text, and the blocks' errors.

The models are checkpoints of training runs of one geometry (other seeds, say); the dataset's train split calibrates,
its valid split is measured on. A method is a name and settings of the job `shape`; what it leaves out is the default.

    python scripts/upcycle/compare_shape_methods.py --data data/megatron/synth_kd_v1 \\
        --old configs/nano/qwen3_o200k.yaml --new configs/nano/vpdense0_5_8.yaml \\
        --checkpoint runs/seed_1 --checkpoint runs/seed_2 --checkpoint runs/seed_3 \\
        --method "plain: attention=meanpool, feed_forward=l2_topk" --method "calibrated:" --json comparison.json

`--method` may be left out: then the baselines and the default are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_vpmoe.runtime.device import prepare

prepare()

from megatron_vpmoe.config import load_config  # noqa: E402
from megatron_vpmoe.files import json_bytes, write_atomically  # noqa: E402
from megatron_vpmoe.training.checkpoint import open_checkpoint  # noqa: E402
from vpmoe.upcycle.passages import Passages  # noqa: E402
from vpmoe.upcycle.shape import convert_blocks, measure  # noqa: E402
from vpmoe.upcycle.shape_settings import ShapeSettings  # noqa: E402
from vpmoe.weights import megatron_checkpoint  # noqa: E402

METHODS = (
    "plain: attention=meanpool, feed_forward=l2_topk",
    "closed form: steps=0",
    "calibrated attention: feed_forward=l2_topk",
    "calibrated feed-forward: attention=meanpool",
    "calibrated from the plain start: attention_start=meanpool, feed_forward_start=l2_topk",
    "calibrated:",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="built dataset")
    parser.add_argument("--old", required=True, help="configuration of the checkpoints")
    parser.add_argument("--new", required=True, help="configuration of the geometry to convert to")
    parser.add_argument("--checkpoint", action="append", required=True, help="run directory; once for each model")
    parser.add_argument("--method", action="append", help='"name: setting=value, ..."; once for each method')
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--heldout-tokens", type=int, default=16384)
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    options = parser.parse_args()
    methods = dict(map(method, options.method or METHODS))
    found = {
        name: [compare(Path(run), settings, options) for run in options.checkpoint]
        for name, settings in methods.items()
    }
    if options.json:
        write_atomically(options.json, json_bytes(found))
    print(table(found))
    return 0


def method(text: str) -> tuple[str, dict[str, str]]:
    """ "name: setting=value, ..." -> the name and the settings."""
    name, _, settings = text.partition(":")
    return name.strip(), dict(part.strip().split("=") for part in settings.split(",") if part.strip())


def compare(run: Path, chosen: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """One model by one method: what ``measure`` says, the error on the calibration texts, and the seconds taken."""
    old, new = load_config(options.old), load_config(options.new)
    settings = ShapeSettings.model_validate(
        {"calibration": options.data, "calibration_tokens": options.calibration_tokens, **chosen}
    )
    weights = megatron_checkpoint.read_weights(open_checkpoint(run).path)

    def passages(split: str, count: int) -> Passages:
        return Passages.of_dataset(
            options.data,
            split,
            count,
            longest=settings.text_tokens,
            padded_vocab_size=old.model.padded_vocab_size,
            seed=settings.seed,
        )

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        converted, errors = convert_blocks(
            (old, weights),
            new,
            settings,
            passages("train", settings.calibration_tokens) if settings.calibrated else None,
            Path(scratch),
            source=str(run),
            progress=lambda what, size: None,
        )
        seconds = time.monotonic() - started
        heldout = passages("valid", options.heldout_tokens)
        rungs = {"after": (new, converted)}
        result = measure((old, weights), rungs, heldout, settings.batch_tokens, source=str(run))
    lost = result["loss"]["after"] - result["loss"]["before"]
    print(f"{run}  {chosen}  loses {lost:.4f} nats a token, {seconds:.0f} s", file=sys.stderr, flush=True)
    return {
        "checkpoint": str(run),
        "settings": settings.model_dump(mode="json"),
        "lost": lost,
        "seconds": seconds,
        **result,
        "calibration_error": errors,
    }


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row a method; loss before and lost nats for each model, and the mean block error over models."""
    first = next(iter(found.values()))
    names = [Path(entry["checkpoint"]).name for entry in first]
    lines = [
        "| method | " + " | ".join(f"{name} lost" for name in names) + " | attention error | feed-forward error | s |",
        "|---|" + "---|" * (len(names) + 3),
        "| (loss of the original) | " + " | ".join(f"{entry['loss']['before']:.4f}" for entry in first) + " | | | |",
    ]
    for name, entries in found.items():
        lost = " | ".join(f"{entry['lost']:.4f}" for entry in entries)
        blocks = [block for entry in entries for block in entry["relative_output_error"]["after"].values()]
        attention, feed_forward = (
            statistics.mean(block[part] for block in blocks) for part in ("attention", "feed_forward")
        )
        seconds = statistics.mean(entry["seconds"] for entry in entries)
        lines.append(f"| {name} | {lost} | {attention:.3f} | {feed_forward:.3f} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
