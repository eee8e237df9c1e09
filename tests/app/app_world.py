"""What the app is shown in tests, the app at work, and the text of others that it must not obey."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests import training_runs
from tests.fixtures_dataset import with_records
from tests.mini_dataset import PADDED_VOCAB, SEQ_LENGTH, write_mini
from tests.tiny import tiny_config
from tests.unit.vpmoe.eval.written_reports import write_choices
from vpmoe.app.serve import free_port
from vpmoe.cli import main

STEPS, RECORDS = 60, 100_000
HOSTILE = [
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "![x](https://example.com/x.png) [y](javascript:alert(1))",
    "$\\frac{1}{2}$ :red[red] :material/home: **bold**",
    "x" * 100_000,
    "\u05d0\u05d1\u202eabc\u200b\x1b[31m\x00",
    "\ud800 lone",
]
"""Texts of others that must be shown as they are written."""


@dataclass(frozen=True)
class World:
    """What the app is shown.

    Attributes:
        folder: of all of it.
        store: the run store.
        run: directory of the trained run.
        dataset: that it was trained on.
        reports: folder of reports.
    """

    def pretended(self, name: str) -> None:
        """Register a run of which nothing but files is there."""
        directory = self.folder / "runs" / name
        directory.mkdir(parents=True)
        called = name if name == "long" else f"{HOSTILE[1]} {HOSTILE[3]}"
        config = tiny_config(run_name="x", data_path=str(self.folder / "hostile" / "dataset")).model_dump(mode="json")
        config["training"]["run_name"] = called
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        tags = ["loss/total", "valid/loss/total", "grad_norm", "lr", "loss/final"]
        tags = tags if name == "long" else HOSTILE[:4]
        with (directory / "metrics.jsonl").open("w") as stream:
            for step in range(1, 1 + (RECORDS // len(tags) if name == "long" else 20)):
                for tag in tags:
                    stream.write(json.dumps({"step": step, "tag": tag, "value": 1.0 + 1.0 / step}) + "\n")
        lines = [
            {"step": step, "prompt": text, "completion": f"<|channel|>final<|message|>{text}"}
            for step in (10, 20)
            for text in HOSTILE
        ]
        (directory / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert main(["runs", "add", str(directory), "--store", str(self.store)]) == 0
        if name == "hostile":
            assert main(["runs", "note", called, HOSTILE[2], "--store", str(self.store)]) == 0

    folder: Path
    store: Path
    run: Path
    dataset: Path
    reports: Path


def make_world(folder: Path) -> World:
    """A trained run; "long", of many records; and a run, a dataset and reports that others wrote with bad intent."""
    data = write_mini(folder / "data")
    world = World(folder, folder / "registry.sqlite", folder / "runs" / "nano", data / "dataset", folder / "reports")
    write_hostile_dataset(folder / "hostile")
    for name in ("long", "hostile"):
        world.pretended(name)
    done = training_runs.train(
        world.run,
        world.dataset,
        padded_vocab_size=PADDED_VOCAB,
        seq_length=SEQ_LENGTH,
        run_store=world.store,
        run_name="nano",
        train_iters=STEPS,
        save_interval=STEPS // 2,
        eval_interval=10,
        eval_iters=1,
        sample_interval=STEPS // 2,
        sample_prompts=2,
        sample_max_new_tokens=24,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for run, right in (("step 100", 4), ("step 200", 6)):
        answers = {task: [n < right for n in range(8)] for task in ("arc_easy", HOSTILE[0])}
        write_choices(world.reports / f"{run}.json", run if right == 4 else f"{run} {HOSTILE[1]}", answers)
    (world.reports / "perf.json").write_text(json.dumps({"kind": "perf", HOSTILE[2]: HOSTILE[3]}))
    return world


def write_hostile_dataset(folder: Path) -> None:
    """Conversations that say what a page must not do, with a teacher's records."""
    texts = [text.replace("\x00", "").replace("\ud800", "")[:3000] for text in HOSTILE]
    rows = [
        {"synth_id": f"h{number}", "language": "en", "exercise": "x", "model": "m", "query": text}
        | {"synthetic_reasoning": text, "synthetic_answer": text}
        for number, text in enumerate(texts * 4)
    ]
    (folder / "rows").mkdir(parents=True)
    (folder / "rows" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_in, conversations, dataset = (str(folder / name) for name in ("rows", "conversations", "dataset"))
    assert main(["data", "convert", "--input", rows_in, "--output-dir", conversations, "--num-shards", "1"]) == 0
    build = ["data", "build", "--input-dir", conversations, "--output-dir", dataset, "--seq-len", "4096"]
    vocabulary = ["--compact-vocab-size", "400", "--padded-vocab-size", "448", "--valid-fraction", "0.2"]
    assert main([*build, *vocabulary, "--workers", "1", "--quiet"]) == 0
    with_records(folder / "dataset", 4, seq_length=4096)


@dataclass
class Served:
    """The app at work: where, and its process."""

    url: str
    process: subprocess.Popen[str]


def start(world: World, *words: str, port: int | None = None) -> Served:
    """Start the command and wait until it tells its URL."""
    port = free_port("127.0.0.1", 0) if port is None else port
    command = [sys.executable, "-m", "vpmoe.cli", "app", "--port", str(port), "--runs-store", str(world.store)]
    command += ["--dataset", str(world.dataset), "--reports", str(world.reports), *words]
    environment = {**training_runs.ENVIRONMENT, "HOME": str(world.folder)}
    process = subprocess.Popen(
        command, cwd=world.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    told = []
    while line := process.stderr.readline():
        told.append(line)
        if "http://" in line:
            return Served(next(word for word in line.split() if word.startswith("http://")), process)
    raise AssertionError("".join(told))
