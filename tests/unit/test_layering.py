"""The directions of imports, the place of patches and the size of files: what docs/architecture.md draws."""

from __future__ import annotations

import ast
import importlib
import linecache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEGATRON_VPMOE = ROOT / "Megatron-vpmoe" / "megatron_vpmoe"
VPMOE = ROOT / "vpmoe"

# Rooms from the ground up; a module may import its own room and any below.
FLOORS = {
    "errors": 0,
    "config": 1,
    "runtime": 2,
    "model": 3,
    "optim": 3,
    "data": 3,
    "objectives": 3,
    "metrics": 3,
    "training": 4,
    "generation": 4,
    "profiling": 4,
    "launch": 5,
    "pretrain": 5,
}
# On one floor only these cross: an objective reads a batch, training shows samples, profiling runs steps.
SAME_FLOOR = {("objectives", "data"), ("training", "generation"), ("profiling", "training")}
NO_MODEL = ("tokenizer", "harmony", "data_curation")


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Every absolute module that a file imports at run time, with its line; TYPE_CHECKING blocks are left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def python_files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_megatron_vpmoe_imports_downwards() -> None:
    wrong = []
    for path in python_files(MEGATRON_VPMOE):
        room = path.relative_to(MEGATRON_VPMOE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for module, line in imports_of(path):
            if module.split(".")[0] == "vpmoe":
                wrong.append(f"{path}:{line}: imports the sidecar ({module})")
            if not module.startswith("megatron_vpmoe."):
                continue
            other = room_of(module)
            if other == room or FLOORS[other] < FLOORS[room] or (room, other) in SAME_FLOOR:
                continue
            wrong.append(f"{path}:{line}: {room} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_the_test_knows_every_room() -> None:
    rooms = {p.name.removesuffix(".py") for p in MEGATRON_VPMOE.iterdir() if not p.name.startswith("__")}
    assert rooms <= set(FLOORS)


@pytest.mark.parametrize("room", NO_MODEL)
def test_data_side_knows_no_model(room: str) -> None:
    allowed = "megatron.core.datasets"
    wrong = [
        f"{path}:{line}: {module}"
        for path in python_files(VPMOE / room)
        for module, line in imports_of(path)
        if module.split(".")[0] in ("torch", "megatron_vpmoe", "transformers")
        or (module.startswith("megatron") and not module.startswith(allowed))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_device_patches_upstream() -> None:
    """No other module assigns to an attribute of megatron.core's modules or of torch."""
    wrong = []
    for path in [*python_files(MEGATRON_VPMOE), *python_files(VPMOE)]:
        if path == MEGATRON_VPMOE / "runtime" / "device.py":
            continue
        tree = ast.parse(path.read_text())
        upstream = {"torch"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("megatron.core", "torch")):
                upstream |= {alias.asname or alias.name for alias in node.names}
            if isinstance(node, ast.Assign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    base = target
                    while isinstance(base, ast.Attribute):
                        base = base.value
                    if isinstance(target, ast.Attribute) and isinstance(base, ast.Name) and base.id in upstream:
                        wrong.append(f"{path}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_files_stay_small() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for root in (MEGATRON_VPMOE, VPMOE, ROOT / "scripts", ROOT / "ref")
        for path in python_files(root)
        if (lines := len(path.read_text().splitlines())) > 350
    }
    assert not long, long


def test_upstream_still_needs_every_answer() -> None:
    """Each assumption that runtime/device.py answers stands where it says in the pinned megatron-core."""
    from megatron_vpmoe.runtime.device import ANSWERS

    for answer in ANSWERS:
        module = importlib.import_module(f"megatron.core.{answer.module}")
        line = linecache.getline(str(module.__file__), answer.line)
        assert answer.assumes in line, f"{answer.module}:{answer.line} reads {line!r}; the answer may not be needed"
