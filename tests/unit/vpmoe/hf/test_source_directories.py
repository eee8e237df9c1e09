"""What an HF directory can be besides sound: each is refused in one message, at once, and nothing is made of it."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.conftest import fuzz_settings
from tests.unit.vpmoe.upcycle.tiny_vocabularies import write_model
from vpmoe.cli import main
from vpmoe.errors import VpmoeError
from vpmoe.hf.convert import open_directory
from vpmoe.hf.tokenizer_files import made_from, open_tokenizer
from vpmoe.tokenizer.hf_directory import HFDirectory

EMBEDDING = "model.embed_tokens.weight"
LAYER = "model.layers.0."
Q, K = (f"{LAYER}self_attn.{name}_proj.weight" for name in "qk")
BIAS = f"{LAYER}self_attn.q_proj.bias"
GATE, UP, DOWN = (f"{LAYER}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sound") / "hf")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "hf"))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        whole = {name: tensor.contiguous() for name, tensor in found.items()}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def move_rows(one: str, other: str) -> Change:
    def change(found: dict[str, torch.Tensor]) -> None:
        both = torch.cat([found[one], found[other]])
        found[one], found[other] = both[: len(found[one]) + 16], both[len(found[one]) + 16 :]

    return tensors(change)


def replaced(**changes: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    names = {"embedding": EMBEDDING, "k": K, "up": UP, "down": DOWN}
    return tensors(lambda found: found.update({names[key]: f(found[names[key]]) for key, f in changes.items()}))


def config(**changes: Any) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def index(weight_map: Any) -> Change:
    def apply(folder: Path) -> None:
        shutil.copytree(folder, folder.parent / "other")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return apply


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def twice(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "again.safetensors")
    index({"a": "model.safetensors", "b": "again.safetensors"})(folder)


FAULTS: dict[str, tuple[Change, str]] = {
    "surplus": (
        tensors(lambda found: found.update({BIAS: torch.zeros(64)})),
        f"surplus: {BIAS}",
    ),
    "missing": (tensors(lambda found: found.pop(DOWN)), f"missing: {DOWN}"),
    "few rows": (replaced(embedding=lambda rows: rows[:320]), f"{EMBEDDING}: [320, 32], the geometry says [340, 32]"),
    "integers": (replaced(up=lambda w: w.to(torch.int8)), f"weights of integers, {UP}: torch.int8"),
    "no dtype of ours": (replaced(up=lambda w: w.to(torch.float8_e4m3fn)), f"{UP} has dtype F8_E4M3"),
    "rows of q in k": (move_rows(Q, K), f"{Q}: [80, 32], the geometry says [64, 32]"),
    "rows of gate in up": (move_rows(GATE, UP), f"{GATE}: [96, 32], the geometry says [80, 32]"),
    "columns": (replaced(down=lambda w: w[:, :-1]), f"{DOWN}: [32, 79], the geometry says [32, 80]"),
    "mixed dtypes": (replaced(k=lambda w: w.bfloat16()), f"{K} torch.bfloat16"),
    "another folder's file": (
        index({EMBEDDING: "../other/model.safetensors"}),
        "'../other/model.safetensors' is no name",
    ),
    "an absolute path": (index({EMBEDDING: "/etc/passwd"}), "'/etc/passwd' is no name"),
    "a number for a file": (index({EMBEDDING: 3}), "no table of file names"),
    "a list for a file": (index({EMBEDDING: [["model.safetensors"]]}), "no table of file names"),
    "a list for the index": (index(["model.safetensors"]), "no table of file names"),
    "a long name": (index({EMBEDDING: "x" * 5000}), "not found"),
    "an index that is none": (text("model.safetensors.index.json", "[" * 100_000), "cannot be read"),
    "twice": (twice, "lies in two files"),
    "ids without rows": (
        lambda folder: [config(vocab_size=300)(folder), replaced(embedding=lambda rows: rows[:300])(folder)],
        "it has ids up to 309, and the embedding 300 rows",
    ),
    "a list for RoPE": (config(rope_parameters=[1]), "rope_parameters = [1]"),
    "text for RoPE": (config(rope_parameters={"rope_theta": "fast"}), "rope_parameters.rope_theta = 'fast'"),
    "no vocabulary": (config(vocab_size=None), "vocab_size = None"),
    "text for the vocabulary": (config(vocab_size="340"), "vocab_size = '340'"),
    "a vocabulary without end": (config(vocab_size=10**18), "padded_vocab_size = 1000000000000000000: must be"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads = 0"),
    "layers without end": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, and the weights hold 1"),
    "a great size": (config(hidden_size=10**6, num_attention_heads=10**4), "geometry says [340, 1000000]"),
    "fractions of layers": (config(num_hidden_layers=1e9), "num_hidden_layers = 1000000000.0"),
    "a size without end": (config(hidden_size=10**15), "hidden_size = 1000000000000000: must be"),
    "a depth without end": (text("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000), "cannot be read"),
    "a depth": (text("config.json", '{"a":' * 500 + "1" + "}" * 500), "nested deeper than 100"),
    "a list for a configuration": (text("config.json", "[]"), "holds list"),
    "prompts": (config(prompts={"system": [1]}), "prompts.system = [1]"),
    "a nan": (config(rms_norm_eps=float("nan")), "rms_norm_eps = nan"),
    "no tokenizer": (text("tokenizer.json", "{}"), "no readable tokenizer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_it_is_refused_by_name(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = FAULTS[name]
    change(folder)
    target = folder.parent / "megatron"
    started = time.monotonic()
    assert main(["hf", "import", str(folder), str(target)]) == 2
    message = capsys.readouterr().err
    assert said in message and "remedy" in message and len(message) < 1500
    assert time.monotonic() - started < 5
    assert not target.exists() and not target.with_name("megatron.partial").exists()


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nothing/below"])
def test_a_target_that_cannot_be_made(
    where: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["hf", "import", str(folder), str(tmp_path / where)]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / where).removesuffix("/below") in said and "remedy" in said
    assert (tmp_path / "file").read_text() == "mine"


DEEP: Any = 1
for _ in range(300):
    DEEP = [DEEP]
JUNK = st.sampled_from(
    (
        None,
        True,
        -1,
        0,
        1,
        7,
        10**9,
        10**30,
        0.5,
        1e300,
        float("nan"),
        "",
        "7",
        "../x",
        "\0",
        "\ud800",
        [],
        [1],
        {},
        DEEP,
    )
)
STEPS = st.lists(st.integers(0, 400), min_size=1, max_size=6)
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")


def mutated(value: Any, steps: list[int], action: str, junk: Any) -> Any:
    """A JSON value with one place in it replaced, removed or added to; the steps lead there."""
    if not isinstance(value, dict | list) or not value:
        return junk
    items = dict(value.items() if isinstance(value, dict) else enumerate(value))
    key = list(items)[steps[0] % len(items)]
    if len(steps) > 1 and isinstance(items[key], dict | list):
        items[key] = mutated(items[key], steps[1:], action, junk)
    elif action == "remove":
        del items[key]
    else:
        items[key if action == "replace" else f"{key}_"] = junk
    return items if isinstance(value, dict) else list(items.values())


def with_header(content: bytes, change: Callable[[Any], Any]) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def opened(folder: Path) -> None:
    """Everything that is done with a source before the first weight is written."""
    model = open_directory(folder)
    for tensor in model.weights.values():
        tensor.read()
    made_from(model.assets)
    open_tokenizer(folder)


def read_or_refused(folder: Path, name: str, content: bytes) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    started = time.monotonic()
    try:
        for read in (opened, HFDirectory):
            with contextlib.suppress(VpmoeError):
                read(folder)
    finally:
        (folder / name).write_bytes(whole)
    assert time.monotonic() - started < 5


@pytest.mark.slow
@fuzz_settings(80)
@given(name=st.sampled_from(FILES), steps=STEPS, action=st.sampled_from(("replace", "remove", "add")), junk=JUNK)
def test_one_place_of_a_file_changed(folder: Path, name: str, steps: list[int], action: str, junk: Any) -> None:
    content = (folder / name).read_bytes()
    change = functools.partial(mutated, steps=steps, action=action, junk=junk)
    if name.endswith(".json"):
        read_or_refused(folder, name, json.dumps(change(json.loads(content))).encode())
    else:
        read_or_refused(folder, name, with_header(content, change))


@fuzz_settings(40)
@given(name=st.sampled_from(FILES), at=st.integers(0, 4000), new=st.binary(max_size=12), cut=st.booleans())
def test_some_bytes_of_a_file_changed(folder: Path, name: str, at: int, new: bytes, cut: bool) -> None:
    content = (folder / name).read_bytes()
    at %= len(content)  # of the weights the header, and a little more
    read_or_refused(folder, name, content[:at] + new + content[len(content) if cut else at + len(new) :])
