"""Whatever is written into a configuration, it is loaded, or refused with one message, soon and without a traceback."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.config import RunConfig, config_hash, load_config
from megatron_vpmoe.config.memory import describe_geometry
from megatron_vpmoe.config.schema import FieldSpec, fields
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.launch.workers import Nodes
from tests.conftest import fuzz_settings

FIELDS = list(fields().values())
Write = Callable[..., Path]
BOMB = "[&a [x], &b [*a, *a, *a, *a], &c [*b, *b, *b, *b], &d [*c, *c, *c, *c], *d, *d]"

HOSTILE = [
    *("!!bool abc", "!!timestamp x", "!!int ''", "!!float x", "!!set {a}", "!!binary x", "!!python/name:os.system"),
    *("9" * 5000, "-" + "9" * 4299, "1e30", "1e400", "-1e-400", "-0.0", "-0", ".inf", "-.nan", "0x10", "1_0", "²"),
    *("[" * 3000, "[" * 3000 + "]" * 3000, "{" * 99 + "}" * 99, "&a [*a]", BOMB, "*nothing", "? [a]\n    : b"),
    *('"a\\0b"', '"\\ud800"', '" "', "''", '"' + "long" * 2000 + '"', "2024-01-01", "[[]]", "[{}]", "{}", "null"),
    *("[{path: a, path: b, weight: 1}]", "[{[a]: 1}]", "[{path: a, weight: -0.0}]", "[a, a]", "{<<: {a: 1}}"),
]
hostile = st.one_of(
    st.sampled_from(HOSTILE),
    st.integers(-(10**40), 10**40).map(str),
    st.floats(allow_subnormal=False).map(repr),
    st.text(max_size=12),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), st.lists, max_leaves=9).map(
        json.dumps
    ),
)


def loaded(path: Path, flags: list[str], *named: str) -> RunConfig | None:
    """The configuration; or None, after a look at the message, which has to hold one of ``named``."""
    started = time.process_time()
    try:
        cfg = load_config(path, flags, nodes=1)
        describe_geometry(cfg, on_cpu=True)
    except ConfigError as error:
        assert len(str(error)) < 20_000
        assert any(name in str(error) for name in named), error
        cfg = None
    assert time.process_time() - started < 5
    return cfg


@pytest.mark.slow
@fuzz_settings(100)
@given(spec=st.sampled_from(FIELDS), text=hostile)
def test_any_value_in_the_file(spec: FieldSpec, text: str, child: Write, tmp_path: Path) -> None:
    path = child("")
    path.write_bytes(path.read_bytes() + f"{spec.section}:\n  {spec.name}: {text}\n".encode(errors="surrogatepass"))
    cfg = loaded(path, [], str(path), spec.key)
    if cfg is not None:
        again = tmp_path / "again.yaml"
        again.write_text(cfg.to_yaml())
        assert config_hash(load_config(again)) == config_hash(cfg)


@pytest.mark.slow
@fuzz_settings(100)
@given(spec=st.sampled_from(FIELDS), text=hostile, attached=st.booleans())
def test_any_value_of_a_flag(spec: FieldSpec, text: str, attached: bool, small: Path) -> None:
    words = [f"{spec.flag}={text}"] if attached else [spec.flag, text]
    loaded(small, words, spec.key, spec.flag, text)


@pytest.mark.slow
@fuzz_settings(50)
@given(words=st.lists(hostile | st.sampled_from([spec.flag for spec in FIELDS]), max_size=4))
def test_any_words(words: list[str], small: Path) -> None:
    loaded(small, words, "command line")


@fuzz_settings(100)
@given(text=st.binary(max_size=40) | hostile.map(lambda text: text.encode(errors="surrogatepass")), data=st.data())
def test_any_file(text: bytes, data: st.DataObject, child: Write) -> None:
    path = child("optim: {lr: 1e-3}\ndata: {blend: null}\n")
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:at] + text + whole[at:])
    loaded(path, [], str(path), "extends")


@fuzz_settings(50)
@given(
    values=st.dictionaries(
        st.sampled_from(["NNODES", "NODE_RANK", "MASTER_PORT", "MASTER_ADDR"]),
        st.sampled_from(["", "²", "٣", " 1", "-1", "1e3", "9" * 5000, "70000", "host", "a b", "\udcff", "::1"])
        | st.integers(0, 10**6).map(str),
    )
)
def test_any_environment(values: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    try:
        nodes = Nodes.from_environment()
    except ConfigError as error:
        assert any(name in str(error) for name in values)
    else:
        assert 0 <= nodes.rank < nodes.count <= 10**5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("!!bool abc", "the tag 'tag:yaml.org,2002:bool'"),
        ("!!timestamp x", "the tag 'tag:yaml.org,2002:timestamp'"),
        ("9" * 5000, "cannot be read"),
        ("[" * 3000 + "]" * 3000, "nested more than 10 deep"),
        (BOMB, "an alias"),
        ("[{path: a, path: b}]", "a key is given twice"),
        (f"[{'a, ' * 9999}]", "more than 4,000 values"),
    ],
    ids=["bool", "timestamp", "digits", "deep", "bomb", "twice", "many"],
)
def test_what_no_field_means_is_refused_with_its_line(child: Write, text: str, expected: str) -> None:
    path = child(f"data:\n  blend: {text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)
    assert f"{path}:3" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--seed 4294967296", "training.seed = 4294967296 must be at most 4294967295: NumPy"),
        ("--data-seed -1", "data.data_seed = -1 must be at least 0"),
        ("--global-batch-size 1000000000000", "must be at most 4194304"),
        ("--num-layers 1000000", "must be at most 1024"),
        ("--nproc-per-node 1000000", "must be at most 1024"),
        ("--train-iters 1000000000000", "must be at most"),
        ("--keep-last 1000000000000000000000000000000", "must be at most"),
        ("--save-interval 1e30", "expected an integer"),
        ("--init-method-std 1e30", "must be at most 1: "),
        ("--layernorm-epsilon 1e30", "must be at most 1: "),
        ("--adam-eps 1e-46", "must be at least 1e-30"),
        ("--lr 1e30", "must be at most 10: "),
        ("--weight-decay 1e30", "must be at most"),
        ("--weight-decay 200", "a step multiplies weights by 1 - 200 x 0.01"),
        ("--clip-grad -0.0", "must be 0 without a sign"),
        ("--adam-beta1 0.99999999999", "must be at most 0.99"),
        ("--distributed-timeout-minutes 100000000", "must be at most 10080"),
        ("--run-name " + "a" * 300, "training.run_name"),
        ("--wandb-project=\t", "must not be blank"),
        ("--load-weights=a\0b", "printable characters"),
        ("--data-path=\x1b[2J", "printable characters"),
        ("--blend [{path:\u00a0,weight:1}]", "data.blend[0]"),
        ("--train-only [" + "a," * 300 + "]", "at most 256 items"),
    ],
)
def test_a_value_that_no_run_can_mean(small: Path, flags: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(small, flags.split(" "))
    assert expected in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    loop, pipe, large, fan = (tmp_path / f"{name}.yaml" for name in ("loop", "pipe", "large", "fan"))
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    large.write_text("#" * 2**19)
    fan.write_text("extends: [fan0.yaml, fan0.yaml]\n")
    for depth in range(20):  # two ways each: a million in all
        (tmp_path / f"fan{depth}.yaml").write_text(f"extends: [fan{depth + 1}.yaml, fan{depth + 1}.yaml]\n")
    (tmp_path / "fan20.yaml").write_text("model: {num_layers: 1}\n")
    for path, expected in (
        (loop, "symbolic links"),
        (pipe, "not a file"),
        (Path("/dev/zero"), "not a file"),
        (tmp_path, "not a file"),
        (large, "524,288 bytes"),
        (tmp_path / "a\0b", "null"),
        (tmp_path / ("long" * 100), "name too long"),
        (fan, "more than 32 files"),
    ):
        with pytest.raises(ConfigError, match=expected):
            load_config(path)
        (tmp_path / "child.yaml").write_text(f"extends: {json.dumps(str(path))}\n")
        with pytest.raises(ConfigError):
            load_config(tmp_path / "child.yaml")


def test_a_batch_is_part_of_what_has_to_fit(small: Path) -> None:
    def batches(rows: int) -> Any:
        text = describe_geometry(load_config(small, [f"--global-batch-size={rows}"]), on_cpu=True)
        return text[text.index("batches") :].split()[1]

    assert batches(4194304) == "60.00"  # GiB: two steps of half the rows, 512 positions, 30 bytes
