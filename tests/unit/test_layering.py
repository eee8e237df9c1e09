"""The directions of imports, the place of patches and the size of files: what docs/architecture.md draws."""

from __future__ import annotations

import ast
import functools
import importlib
import linecache
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEGATRON_VPMOE = ROOT / "Megatron-vpmoe" / "megatron_vpmoe"
VPMOE = ROOT / "vpmoe"

# Rooms from the ground up; a module may import its own room and any below.
TRAINER_FLOORS = {
    "errors": -2,
    "annotation": -2,
    "files": -1,
    "software": -1,
    "manifest": 0,
    "token_files": 0,
    "annotation_files": 0,
    "teacher_records": -1,
    "ownership": 0,
    "turns": 0,
    "config": 1,
    "runtime": 2,
    "retrieval": 2,
    "model": 3,
    "think": 3,
    "optim": 3,
    "data": 3,
    "metrics": 3,
    "objectives": 4,
    "generation": 4,
    "sources": 5,
    "training": 6,
    "profiling": 6,
    "planning": 6,
    "launch": 7,
    "pretrain": 7,
}
SIDECAR_FLOORS = {
    "errors": -1,
    "progress": 0,
    "toml_file": 0,
    "commands": 0,
    "trainer": 4,
    "steps": 1,
    "tokenizer": 1,
    "harmony": 1,
    "weights": 1,
    "data_curation": 2,
    "describe": 2,
    "plan": 2,
    "hf": 2,
    "eval": 2,
    "teacher": 3,
    "upcycle": 3,
    "runs": 3,
    "checkpoints": 3,
    "ladder": 4,
    "quickstart": 4,
    "app": 4,
    "cli": 5,
}
# On one floor only these cross: annotations are laid out as token files are; profiling and planning run steps; a layer
# of think is declared among the model's, and made of its norm, masks and linears;
# vocabularies are found in Harmony's specials, questions are asked of what the data side generates; the app shows a
# ladder's report.
SAME_FLOOR = {
    ("annotation_files", "token_files"),
    ("profiling", "training"),
    ("planning", "training"),
    ("planning", "profiling"),
    ("model", "think"),
    ("think", "model"),
    ("harmony", "tokenizer"),
    ("eval", "data_curation"),
    ("eval", "hf"),
    ("app", "ladder"),
}
# `python -m` names that users of the design know: they call the front end.
OLDER_NAMES = VPMOE / "data_curation" / "harmony"
NO_MODEL = ("steps", "tokenizer", "harmony", "data_curation")
# What both packages stand on; it knows no model.
GROUND = tuple(f"megatron_vpmoe.{room}" for room, floor in TRAINER_FLOORS.items() if floor <= 0)


@functools.cache
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
            # What travels with an export imports its neighbours as transformers' loader wants it.
            assert node.level == 0 or path.parent.name == "hf", f"{path}:{node.lineno}: relative import"
            found += [] if node.level else [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def python_files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def wrong_imports(package: Path, floors: dict[str, int]) -> list[str]:
    """Imports between rooms of a package that do not go down."""
    wrong = []
    for path in set(python_files(package)) - set(python_files(OLDER_NAMES)):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for module, line in imports_of(path) if room != "__init__" else []:
            if not module.startswith(f"{package.name}."):
                continue
            other = module.split(".")[1]
            if other.startswith("__") or other == room:
                continue
            if floors[other] >= floors[room] and (room, other) not in SAME_FLOOR:
                wrong.append(f"{path}:{line}: {room} imports {other}")
    return wrong


@pytest.mark.parametrize(("package", "floors"), [(MEGATRON_VPMOE, TRAINER_FLOORS), (VPMOE, SIDECAR_FLOORS)])
def test_rooms_import_downwards(package: Path, floors: dict[str, int]) -> None:
    assert not (wrong := wrong_imports(package, floors)), "\n".join(wrong)


def test_training_does_not_know_the_sidecar() -> None:
    wrong = [
        f"{path}:{line}: {module}"
        for path in python_files(MEGATRON_VPMOE)
        for module, line in imports_of(path)
        if module.split(".")[0] == "vpmoe"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("package", "floors"), [(MEGATRON_VPMOE, TRAINER_FLOORS), (VPMOE, SIDECAR_FLOORS)])
def test_the_test_knows_every_room(package: Path, floors: dict[str, int]) -> None:
    assert {p.name.removesuffix(".py") for p in package.iterdir() if not p.name.startswith("__")} == set(floors)


@pytest.mark.parametrize(("package", "floors"), [(MEGATRON_VPMOE, TRAINER_FLOORS), (VPMOE, SIDECAR_FLOORS)])
def test_the_picture_shows_every_room_on_its_floor(package: Path, floors: dict[str, int]) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    title, *lines = text[text.index("## Layout") :].split("```")[1].strip().splitlines()
    border = title.index(f"{MEGATRON_VPMOE.name}:")
    column = slice(border, None) if package == MEGATRON_VPMOE else slice(border)
    drawn = {room: at for at, line in enumerate(lines) for room in line[column].strip().split(" · ") if room}
    assert set(drawn) == set(floors)
    assert not [(a, b) for a in floors for b in floors if floors[a] > floors[b] and drawn[a] >= drawn[b]]


def test_what_all_stand_on_is_light() -> None:
    """The ground of both packages, and with it the data side, loads without torch."""
    program = (
        f"import sys, {', '.join(GROUND)}, vpmoe.steps, vpmoe.tokenizer, vpmoe.harmony; print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout.strip() == "False"


@pytest.mark.parametrize("room", NO_MODEL)
def test_data_side_knows_no_model(room: str) -> None:
    allowed = "megatron.core.datasets"
    wrong = [
        f"{path}:{line}: {module}"
        for path in python_files(VPMOE / room)
        for module, line in imports_of(path)
        if module.split(".")[0] in ("torch", "megatron_vpmoe", "transformers", "megatron")
        and not module.startswith((*GROUND, allowed))
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
        if (lines := len(path.read_text().splitlines())) > 300
    }
    assert not long, long


def test_upstream_still_needs_every_answer() -> None:
    """Each assumption that runtime/device.py answers stands where docs/megatron.md says in the pinned megatron-core."""
    from megatron_vpmoe.runtime.device import prepare

    prepare()
    rows = re.findall(r"^\| `([\w.]+)` (\d+) \| `(.+?)` \| .+ \|$", (ROOT / "docs" / "megatron.md").read_text(), re.M)
    assert len(rows) > 20
    for name, number, assumes in rows:
        module = importlib.import_module(f"megatron.core.{name}")
        line = linecache.getline(str(module.__file__), int(number))
        assert assumes in line, f"{name}:{number} reads {line!r}; the answer may not be needed"
