"""What batches cost a step: the time that training waits for packed rows, with and without the thread that makes them.

One model (the nano configuration's) trains on generated conversations of a given length distribution, written and read
as a real dataset. Each round does two steps, in alternating order: one gets its batches from the thread that prepared
them during the step before, the other makes them on the spot. Then it says how full the rows are at 2,048 positions,
for SYNTH's distribution of lengths and, where they lie beside the checkout, for the real rows.

    python scripts/bench/packing.py                     # nano, as configs/nano/stage1.yaml trains
    python scripts/bench/packing.py --seq-length 2048 --median 850 --spread 0.3
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.device import prepare

prepare()

from megatron_vpmoe.config import RunConfig, load_config  # noqa: E402
from megatron_vpmoe.data.blend import open_parts  # noqa: E402
from megatron_vpmoe.data.cursor import SampleOrder  # noqa: E402
from megatron_vpmoe.files import write_record  # noqa: E402
from megatron_vpmoe.sources import StoredSource  # noqa: E402
from megatron_vpmoe.token_files import TripleWriter, file_names  # noqa: E402
from megatron_vpmoe.training.run import Run, open_run  # noqa: E402
from megatron_vpmoe.training.step import train_step  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
EOD = 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "nano" / "stage1.yaml")
    parser.add_argument("--seq-length", type=int, default=384)
    parser.add_argument("--median", type=float, default=76, help="median length of a conversation, in tokens")
    parser.add_argument("--spread", type=float, default=0.3, help="standard deviation of the logarithm of the length")
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=150, help="of two steps")
    rows = REPOSITORY.parent / "shared" / "data" / "synth_sample"
    parser.add_argument("--real-rows", type=Path, default=rows, help="folder of parquet files with SYNTH's columns")
    return parser.parse_args()


def drawn_lengths(median: float, spread: float, count: int, longest: int) -> NDArray[np.int32]:
    """Log-normal lengths, int32 [count], between 8 and ``longest``."""
    drawn = np.random.default_rng(0).normal(np.log(median), spread, count)
    return np.clip(np.exp(drawn), 8, longest).astype(np.int32)


def write_dataset(root: Path, lengths: NDArray[np.int32], cfg: RunConfig) -> None:
    """Random tokens of these lengths as a built dataset: the whole as ``train``, the first 64 as ``valid``."""
    size = cfg.model.padded_vocab_size
    pieces = b"".join(base64.b64encode(f"<{number}>".encode()) + b"\n" for number in range(size))
    (root / "token_pieces.txt").write_bytes(pieces)
    tokenizer = {
        "name": "random",
        "rank_file_sha256": "",
        "vocab_size": size,
        "padded_vocab_size": size,
        "eod_id": EOD,
        "special_tokens": {"<|return|>": 2, "<|call|>": 3},
        "compact_map": None,
        "pieces": {"path": "token_pieces.txt", "sha256": hashlib.sha256(pieces).hexdigest()},
    }
    splits = {
        split: write_split(root / split, own, size) for split, own in (("train", lengths), ("valid", lengths[:64]))
    }
    manifest = {"schema_version": 1, "kind": "harmony_kd", "seq_length": cfg.data.seq_length}
    write_record(root / "manifest.json", {**manifest, "tokenizer": tokenizer, "splits": splits})


def write_split(folder: Path, lengths: NDArray[np.int32], vocabulary: int) -> dict[str, object]:
    """One shard; the second half of each conversation is supervised."""
    folder.mkdir()
    writer, tokens = TripleWriter(folder / "shard_00"), int(lengths.sum())
    ids = np.random.default_rng(1).integers(2, vocabulary, tokens, dtype=np.int32)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    answer = (2 * (np.arange(tokens) - starts) > np.repeat(lengths, lengths)).astype(np.uint8)
    writer.add(ids, answer, 2 * answer, lengths.astype(np.int64))
    writer.close()
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": ""} for name in file_names("shard_00")}
    shard = {"name": "shard_00", "rows": len(lengths), "tokens": tokens, "files": files}
    return {"rows": len(lengths), "tokens": tokens, "shards": [shard]}


def waits(run: Run, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of (waiting, stepping) of every step, with the thread ("ahead") and without it ("on the spot")."""
    cfg, seconds = run.cfg, {"ahead": ([], []), "on the spot": ([], [])}
    sides = {"ahead": run.source, "on the spot": StoredSource(open_parts(cfg, "train"), cfg, 0, 1)}
    for number in range(-3, rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            batches = sides[name].next_step().batches
            waited = time.perf_counter() - began
            train_step(run.wrapped, run.optimizer, run.objective, batches)
            if number >= 0:
                seconds[name][0].append(waited)
                seconds[name][1].append(time.perf_counter() - began - waited)
    return seconds


def fill(lengths: NDArray[np.int32], seq_length: int) -> float:
    """Share of real tokens in the rows of one epoch."""
    order = SampleOrder(lengths, seq_length=seq_length, window=4096, seed=1234)
    return float(lengths.sum(dtype=np.int64)) / (order.first_sample_of_epoch(1) * seq_length)


def real_lengths(folder: Path, longest: int) -> NDArray[np.int32]:
    """Tokens of each real row as a Harmony conversation with its end-of-document token, at most ``longest``."""
    import pyarrow.parquet as parquet

    from vpmoe.data_curation.conversations.synth import to_conversation
    from vpmoe.harmony.prompts import Prompts
    from vpmoe.harmony.renderer import make_renderer
    from vpmoe.tokenizer.o200k_harmony import O200kHarmony

    renderer, prompts = make_renderer("fast", O200kHarmony()), Prompts()
    tables = [parquet.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))]
    conversations = (to_conversation(row, prompts).messages for table in tables for row in table)
    return np.minimum([len(renderer.render(messages)) + 1 for messages in conversations], longest).astype(np.int32)


def main() -> None:
    args = arguments()
    lengths = drawn_lengths(args.median, args.spread, args.conversations, args.seq_length)
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--seq-length {args.seq_length} --micro-batch-size {args.micro_batch_size} --nproc-per-node 1"
        flags += f" --data-path {folder} --run-dir {folder}/run --wandb-mode disabled"
        cfg = load_config(args.config, flags.split())
        write_dataset(Path(folder), lengths, cfg)
        with distributed.single_process(cfg.training.seed):
            run = open_run(cfg)
            with closing(run.source):
                seconds = waits(run, args.rounds)
    spot_total = sum(sum(side) for side in seconds["on the spot"])
    for name, (waited, stepped) in seconds.items():
        total = sum(waited) + sum(stepped)
        print(
            f"{name:>12}: waiting {100 * sum(waited) / total:6.3f} % of the step (longest {1e3 * max(waited):.1f} ms), "
            f"step {1e3 * statistics.median(stepped):.1f} ms (median), all {100 * total / spot_total:.1f} %"
        )
    synth = drawn_lengths(850, 0.3, 50_000, 2048)
    print(f"real tokens: {100 * fill(lengths, args.seq_length):.2f} % of {args.seq_length} positions as trained here,")
    print(f"             {100 * fill(synth, 2048):.2f} % of 2048 with SYNTH's lengths (median 850, 50,000 drawn),")
    if args.real_rows.is_dir():
        real = real_lengths(args.real_rows, 2048)
        print(f"             {100 * fill(real, 2048):.2f} % of 2048 with {len(real)} real rows")
    else:
        print(f"             (no real rows in {args.real_rows})")


if __name__ == "__main__":
    main()
