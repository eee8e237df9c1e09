"""The golden losses of tests/golden: compare runs with them, renew them, and prove that they see a changed constant.

    python scripts/golden_losses.py                    # thirty steps of each run; exit code 1 where any number deviates
    python scripts/golden_losses.py --renew            # what changes, and then store it
    python scripts/golden_losses.py --mutations        # every constant changed by itself: at which step it is seen

Renew them in the commit that changes a constant or the order of sums on purpose, and say there what it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.golden import nano_losses
from tests.golden.nano_losses import Deviation, Readings
from tests.mini_dataset import write_mini
from tests.workers import start_fork_server

_SHOWN = 20


def compare(dataset: Path, folder: Path) -> tuple[dict[str, Readings], dict[str, list[Deviation]]]:
    """Each run, and how it deviates from what is stored."""
    begun = {of: nano_losses.started(of, folder / of, dataset) for of in nano_losses.RUNS}
    found = {of: nano_losses.finished(run, folder / of) for of, run in begun.items()}
    stored = nano_losses.load() if nano_losses.STORED.exists() else {}
    return found, {of: nano_losses.deviations(read, stored.get(of, {})) for of, read in found.items()}


def tell(found: list[Deviation]) -> None:
    """The first of them, and how many there are of each tag."""
    for deviation in found[:_SHOWN]:
        print(f"  {deviation}")
    if len(found) > _SHOWN:
        print(f"  and {len(found) - _SHOWN} more, of {len({each.tag for each in found})} tags")


def prove(dataset: Path, word: str) -> int:
    """Print the table of mutations with ``word`` in their names as each has ended; 1 where one is not seen."""
    print("| constant changed | seen at step | by | times its tolerance |\n|---|---|---|---|")
    unseen = 0
    for name, found in nano_losses.mutated([name for name in nano_losses.MUTATIONS if word in name], dataset):
        unseen += not found
        if not found:
            print(f"| {name} | never | | |")
            continue
        first = max((each for each in found if each.step == found[0].step), key=lambda each: each.times)
        print(f"| {name} | {first.step} | `{first.tag}` | {first.times:.3g} |", flush=True)
    return int(bool(unseen))


def main() -> int:
    """Parse the arguments; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--renew", action="store_true", help="store what the runs give now")
    what.add_argument("--mutations", metavar="WORD", nargs="?", const="", help="run every mutation, or those of a name")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    start_fork_server()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = write_mini(folder) / "dataset"
        if arguments.mutations is not None:
            return prove(dataset, arguments.mutations)
        found, different = compare(dataset, folder)
        for of, numbers in different.items():
            print(f"{of}: {len(numbers)} numbers deviate" if numbers else f"{of}: nothing deviates")
            tell(numbers)
        if arguments.renew:
            nano_losses.store(found)
            print(f"stored: {nano_losses.STORED}")
            return 0
        return int(any(different.values()))


if __name__ == "__main__":
    sys.exit(main())
