"""The builder against message-by-message rendering with openai_harmony, interleaved in one run; scaling; peak memory.

    python scripts/bench/build_kd.py                                      # 8,000 generated rows, 5 rounds
    python scripts/bench/build_kd.py --input data/synth_sample --copies 6 # rows of your own
    python scripts/bench/build_kd.py --scaling-rows 60000                 # one worker against two
    python scripts/bench/build_kd.py --memory-rows 200000 --workers 2     # peak memory of the whole process tree

Prints one JSON object. ``build`` is the whole way from the conversations' parquet to hashed token files and a manifest.
``official`` renders each conversation for training and then each of its messages alone, which is how the length of a
message is found with that package; making its objects of the texts is timed (but not in ``ratio_cpu_without_objects``),
reading is not. ``ratio_cpu`` uses processor time and is the one to read where other work shares the cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import openai_harmony
import psutil
from synth_like_rows import GeneratedRows, RepeatedRows

from vpmoe.data_curation.conversations.convert import convert
from vpmoe.data_curation.conversations.store import StoredConversation, open_shard, read_row_group
from vpmoe.data_curation.datasets.kd import build
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.harmony.official import as_official, load_encoding
from vpmoe.harmony.prompts import Prompts


def prepare(source: GeneratedRows | RepeatedRows, folder: Path, shards: int) -> Path:
    """Conversations of ``source`` with their manifest."""
    convert(source, folder, num_shards=shards, prompts=Prompts())  # pyright: ignore[reportArgumentType]
    return folder


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """``(wall, processor)`` seconds of one call; the processor's are those of this process alone."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def build_afresh(conversations: Path, output: Path, workers: int) -> dict[str, Any]:
    """One whole build into an empty folder; returns the manifest."""
    shutil.rmtree(output, ignore_errors=True)
    return build(conversations, output, BuildOptions(), workers=workers, quiet=True)


def stored(conversations: Path) -> list[StoredConversation]:
    """All conversations of a folder."""
    shards = [open_shard(path) for path in sorted(conversations.glob("*.parquet"))]
    rows = (row for shard in shards for group in range(shard.num_row_groups) for row in read_row_group(shard, group))
    return [row for row in rows if isinstance(row, StoredConversation)]


def render_message_by_message(objects: Iterable[Any]) -> int:
    """Render each conversation, then each of its messages; tokens of the conversations."""
    encoding = load_encoding()
    keep = openai_harmony.RenderConversationConfig(auto_drop_analysis=False)
    tokens = 0
    for conversation in objects:
        tokens += len(encoding.render_conversation_for_training(conversation, keep))
        for message in conversation.messages:
            encoding.render(message)
    return tokens


def speed(conversations: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """One worker against the official rendering, side by side in every round."""
    rows = stored(conversations)
    objects = [as_official(row.messages) for row in rows]
    gc.collect()
    gc.freeze()  # the objects above are the harness's own: neither side should pay for looking through them
    manifest = build_afresh(conversations, scratch, 1)  # loads what both sides load once
    render_message_by_message(objects[:10])
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    ours, theirs, bare = [], [], []
    for _ in range(rounds):
        ours.append(timed(lambda: build_afresh(conversations, scratch, 1)))
        theirs.append(timed(lambda: render_message_by_message(as_official(row.messages) for row in rows)))
        bare.append(timed(lambda: render_message_by_message(objects)))
    wall = [b[0] / a[0] for a, b in zip(ours, theirs, strict=True)]
    processor = [b[1] / a[1] for a, b in zip(ours, theirs, strict=True)]
    return {
        "rows": len(rows),
        "tokens": tokens,
        "rounds": rounds,
        "build": _rates(ours, len(rows), tokens),
        "official": _rates(theirs, len(rows), tokens),
        "ratio_wall": _spread(wall),
        "ratio_cpu": _spread(processor),
        "ratio_cpu_without_objects": _spread([b[1] / a[1] for a, b in zip(ours, bare, strict=True)]),
    }


def scaling(conversations: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """Wall time of one worker against two, side by side in every round; startup of the workers is in it."""
    one, two = [], []
    for _ in range(rounds):
        one.append(timed(lambda: build_afresh(conversations, scratch, 1))[0])
        two.append(timed(lambda: build_afresh(conversations, scratch, 2))[0])
    return {
        "rows": json.loads((conversations / "manifest.json").read_bytes())["rows"],
        "seconds_one": _spread(one),
        "seconds_two": _spread(two),
        "ratio_wall": _spread([a / b for a, b in zip(one, two, strict=True)]),
    }


def memory(conversations: Path, scratch: Path, workers: int) -> dict[str, Any]:
    """Largest sum over the process tree of the builder's command while it runs, sampled ten times a second."""
    shutil.rmtree(scratch, ignore_errors=True)
    script = Path(__file__).parents[1] / "datasets" / "build_synth_kd_v1.py"
    command = [sys.executable, str(script), "--input-dir", str(conversations), "--output-dir", str(scratch)]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.DEVNULL)
    peak = {"rss": 0, "uss": 0}
    while process.poll() is None:
        for name, value in _tree_memory(process.pid).items():
            peak[name] = max(peak[name], value)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the build ended with {process.returncode}")
    seconds = time.perf_counter() - started
    rows = json.loads((conversations / "manifest.json").read_bytes())["rows"]
    return {
        "rows": rows,
        "workers": workers,
        "peak_rss_mb": round(peak["rss"] / 1e6),
        "peak_unshared_mb": round(peak["uss"] / 1e6),
        "rows_per_s": round(rows / seconds),
    }


def _tree_memory(pid: int) -> dict[str, int]:
    total = {"rss": 0, "uss": 0}
    try:
        builder = psutil.Process(pid)
        for process in (builder, *builder.children(recursive=True)):
            measured = process.memory_full_info()
            total["rss"] += measured.rss
            total["uss"] += measured.uss
    except psutil.Error:  # a process that ended between being listed and being read
        pass
    return total


def _rates(seconds: list[tuple[float, float]], rows: int, tokens: int) -> dict[str, float]:
    wall, processor = (min(values) for values in zip(*seconds, strict=True))
    return {
        "rows_per_s": round(rows / wall),
        "tokens_per_s": round(tokens / wall),
        "tokens_per_cpu_s": round(tokens / processor),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "min": round(min(values), 2),
        "median": round(statistics.median(values), 2),
        "max": round(max(values), 2),
    }


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--rows", type=int, default=8000, help="generated rows of the speed comparison; 0 leaves it out"
    )
    parser.add_argument("--input", help="compare on these rows (parquet or JSONL) in place of generated ones")
    parser.add_argument("--copies", type=int, default=1, help="times that --input is taken")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scaling-rows", type=int, default=0, help="generated rows for one worker against two")
    parser.add_argument("--memory-rows", type=int, default=0, help="generated rows for the peak memory")
    parser.add_argument("--workers", type=int, default=1, help="workers of the memory run")
    options = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if options.rows or options.input:
            rows = RepeatedRows(options.input, options.copies) if options.input else GeneratedRows(options.rows)
            report["speed"] = speed(prepare(rows, work / "speed", 2), work / "built", options.rounds)
        if options.scaling_rows:
            conversations = prepare(GeneratedRows(options.scaling_rows), work / "scaling", 4)
            report["scaling"] = scaling(conversations, work / "built", options.rounds)
        if options.memory_rows:
            conversations = prepare(GeneratedRows(options.memory_rows), work / "memory", 4)
            report["memory"] = memory(conversations, work / "built", options.workers)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
