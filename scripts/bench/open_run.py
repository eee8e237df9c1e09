"""How long the app takes to open a long run: a browser's first picture of its curves, and the parts of it.

    python scripts/bench/open_run.py [RECORDS]

Chromium and its driver are needed for the browser's part (apt-get install chromium chromium-driver).
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TAGS = ("loss/total", "valid/loss/total", "grad_norm", "lr", "throughput/tokens_per_second")
TIMES = 5


def write_run(folder: Path, records: int) -> Path:
    """A run of so many records in a store of its own; returns the store."""
    from megatron_vpmoe.config import load_config
    from vpmoe.runs.editing import add

    run, store = folder / "runs" / "long", folder / "registry.sqlite"
    run.mkdir(parents=True)
    steps = records // len(TAGS)
    config = load_config(Path("configs/nano/stage1.yaml"), ["--run-name", "long", "--train-iters", str(steps)])
    (run / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    with (run / "metrics.jsonl").open("w") as stream:
        for step in range(1, steps + 1):
            for tag in TAGS:
                stream.write(json.dumps({"step": step, "tag": tag, "value": 1 + 1 / step}) + "\n")
    add(run, store)
    return store


def parts(store: Path) -> dict[str, float]:
    """Seconds of what the page asks for, median."""
    from vpmoe.runs.queries import series, tags_of
    from vpmoe.runs.registry import list_runs

    asked = {
        "runs": lambda: list_runs(store),
        "tags": lambda: tags_of(list_runs(store)),
        "curves": lambda: series(list_runs(store), TAGS),
    }
    return {name: statistics.median(_seconds(ask) for _ in range(TIMES)) for name, ask in asked.items()}


def in_browser(store: Path) -> list[float]:
    """Seconds from asking for the page until every curve stands, of each time."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    command = [sys.executable, "-m", "vpmoe.cli", "app", "--port", "0", "--runs-store", str(store)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as app:
        try:
            assert app.stderr is not None
            told = next(line for line in app.stderr if "http://" in line)
            url = next(word for word in told.split() if word.startswith("http://"))
            options = webdriver.ChromeOptions()
            options.binary_location = shutil.which("chromium") or ""
            for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
                options.add_argument(flag)
            driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
            try:
                return [_opened(driver, url) for _ in range(TIMES)]
            finally:
                driver.quit()
        finally:
            app.terminate()


def _opened(driver, url: str) -> float:
    began = time.perf_counter()
    driver.get(url)
    while len(driver.find_elements("css selector", "[data-testid=stVegaLiteChart] .marks")) < len(TAGS):
        time.sleep(0.01)
    return time.perf_counter() - began


def _seconds(ask) -> float:
    began = time.perf_counter()
    ask()
    return time.perf_counter() - began


def main() -> None:
    """Print the seconds."""
    records = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        store = write_run(Path(folder), records)
        for name, seconds in parts(store).items():
            print(f"{records:,} records, {name}: {seconds:.3f} s")
        if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
            print("no browser: apt-get install chromium chromium-driver")
            return
        print("in a browser: " + ", ".join(f"{seconds:.2f} s" for seconds in in_browser(store)))


if __name__ == "__main__":
    main()
