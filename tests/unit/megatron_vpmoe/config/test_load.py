"""Files, flags and their errors: what is given is what is loaded, and everything wrong is named at once."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.config import check_world, config_hash, load_config
from megatron_vpmoe.config.flags import accepted_types, nearest
from megatron_vpmoe.config.schema import FieldSpec, RunConfig, fields, section_types
from megatron_vpmoe.errors import ConfigError
from tests.conftest import fuzz_settings

DESIGNS = {
    "qwen3_0_6b.yaml": "qwen3.yaml",
    "qwen3_0_6b_o200k.yaml": "qwen3_o200k.yaml",
    "vpdense0_5_28.yaml": "vpdense0_5_8.yaml",
    "vpdense_28.yaml": "vpdense_8.yaml",
    "vpdense_80.yaml": "vpdense_16.yaml",
    "vpmoe_stage1.yaml": "stage1.yaml",
    "vpmoe_stage2.yaml": "stage2.yaml",
    "vpmoe_stage3.yaml": "stage3.yaml",
}
"""File at full scale -> the same design in nano/."""
FIELDS = list(fields().values())
Write = Callable[..., Path]
relaxed = fuzz_settings(60)


def problems(path: Path, *flags: str, nodes: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(flags), nodes=nodes)
    return str(caught.value)


def choices(annotation: Any) -> list[str]:
    arguments = getattr(annotation, "__args__", ())
    if arguments and all(isinstance(a, str) for a in arguments):
        return list(arguments)
    return [c for a in arguments for c in choices(a)]


def values_of(spec: FieldSpec) -> st.SearchStrategy[Any]:
    """Values of every type that a field accepts; the rules between fields may still object."""
    types = accepted_types(spec)
    text = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)
    options: list[st.SearchStrategy[Any]] = []
    if bool in types:
        options.append(st.booleans())
    if int in types:
        options.append(st.integers(1, 5))
    if float in types:
        options.append(st.floats(1e-9, 0.9))
    if list in types:
        options.append(values_of_list[spec.name])
    if str in types:
        # "null" and "~" mean no value on the command line.
        named = choices(spec.info.annotation)
        options.append(st.sampled_from(named) if named else text.filter(lambda s: s != "null"))
    if type(None) in types:
        options.append(st.none())
    return st.one_of(options)


values_of_list = {
    "eval_suites": st.lists(
        st.fixed_dictionaries(
            {"suite": st.sampled_from(["core8", "a:b"]), "interval": st.integers(1, 9)},
            optional={"options": st.dictionaries(st.sampled_from("ab"), st.none() | st.booleans() | st.floats(0, 1))},
        ),
        max_size=2,
    ),
    "blend": st.lists(st.fixed_dictionaries({"path": st.sampled_from("abc"), "weight": st.integers(0, 3)}), max_size=3),
    "blend_schedule": st.lists(
        st.fixed_dictionaries({"from_sample": st.integers(1, 9), "weights": st.lists(st.integers(0, 3), max_size=3)}),
        max_size=2,
    ),
    "curriculum": st.lists(
        st.fixed_dictionaries(
            {"from_share": st.sampled_from([0.0, 0.5]), "low": st.sampled_from([0.0, 0.5, 1.0]), "rollouts": st.just(1)}
        ),
        max_size=2,
    ),
    "rewards": st.lists(
        st.fixed_dictionaries({"function": st.sampled_from(["finished", "a:b"]), "weight": st.integers(0, 3)}),
        max_size=2,
    ),
    "skip_rows": st.lists(st.integers(0, 3), max_size=2),
    "recompute_modules": st.lists(st.sampled_from(["core_attn", "mlp", "moe", "layernorm"]), max_size=3),
    "train_only": st.lists(st.sampled_from(["*", "embedding.*", "*.bias", "output"]), max_size=2),
    "mixture_experts": st.lists(
        st.fixed_dictionaries(
            {"layer_type": st.sampled_from(["transformer", "denoiser", "a"]), "num_layers": st.integers(0, 2)}
        ),
        max_size=3,
    ),
    "load_experts": st.lists(st.sampled_from(["a", "b"]), max_size=2),
    "lr_multipliers": st.lists(
        st.fixed_dictionaries({"pattern": st.sampled_from("abc"), "factor": st.integers(1, 3)}), max_size=2
    ),
    "weight_decays": st.lists(
        st.fixed_dictionaries({"rule": st.sampled_from("abc"), "weight_decay": st.integers(0, 3)}), max_size=2
    ),
}


def as_flags(spec: FieldSpec, value: Any) -> list[str]:
    if isinstance(value, list):
        return [spec.flag, yaml.safe_dump(value, default_flow_style=True)]
    if isinstance(value, bool):
        return [spec.flag] if value else ["--no-" + spec.flag[2:]]
    return [spec.flag, "null" if value is None else str(value)]


def load_or_error(path: Path, flags: list[str]) -> RunConfig | None:
    try:
        return load_config(path, flags)
    except ConfigError:
        return None


@pytest.mark.slow
@relaxed
@given(data=st.data())
def test_a_flag_equals_the_same_value_in_the_file(data: st.DataObject, small: Path, child: Write) -> None:
    spec = data.draw(st.sampled_from(FIELDS))
    value = data.draw(values_of(spec))
    path = child(yaml.safe_dump({spec.section: {spec.name: value}}))
    by_file, by_flag = load_or_error(path, []), load_or_error(small, as_flags(spec, value))
    assert by_file == by_flag
    if by_file is not None:
        dumped = by_file.model_dump(exclude_unset=True)
        assert dumped[spec.section][spec.name] == value


@pytest.mark.slow
@relaxed
@given(data=st.data())
def test_the_resolved_configuration_reloads_to_the_same_hash(data: st.DataObject, small: Path, tmp_path: Path) -> None:
    flags = []
    for spec in data.draw(st.lists(st.sampled_from(FIELDS), max_size=4, unique_by=lambda spec: spec.name)):
        flags += as_flags(spec, data.draw(values_of(spec)))
    cfg = load_or_error(small, flags)
    if cfg is not None:
        path = tmp_path / "resolved.yaml"
        path.write_text(cfg.to_yaml())
        assert load_config(path) == cfg
        assert config_hash(load_config(path)) == config_hash(cfg)


@relaxed
@given(
    section=st.sampled_from(list(section_types())), key=st.text(string.ascii_lowercase + "_", min_size=1, max_size=16)
)
def test_an_unknown_key_is_always_reported_with_a_suggestion(section: str, key: str, child: Write) -> None:
    if key in section_types()[section].model_fields:
        return
    path = child(yaml.safe_dump({section: {key: 1}}))
    message = problems(path)
    assert f"unknown key {section}.{key}" in message
    assert f"{path}:3" in message  # the file's third line: extends, section, key
    assert any(spec.key in message or f"belongs under {spec.section}:" in message for spec in FIELDS)


@relaxed
@given(spec=st.sampled_from(FIELDS), at=st.integers(0, 40), letter=st.sampled_from(string.ascii_lowercase))
def test_a_typo_finds_the_name_it_was_meant_to_be(spec: FieldSpec, at: int, letter: str) -> None:
    at %= len(spec.name) + 1
    typo = spec.name[:at] + letter + spec.name[at:]
    if len(spec.name) > 4 and typo not in fields():
        assert spec.name in nearest(typo, list(fields()))


def test_every_field_has_one_name_and_one_docstring() -> None:
    assert sum(len(t.model_fields) for t in section_types().values()) == len(FIELDS)
    assert [spec.key for spec in FIELDS if not spec.info.description] == []


def test_shipped_configurations_load(repository: Path) -> None:
    configs = repository / "configs"
    parts = [
        configs / name
        for name in (
            "nano/numbers.yaml",
            "think/nano/numbers.yaml",
            "nano/ladder_training.yaml",
            "upcycle/healing.yaml",
        )
    ]
    others = [*parts, *(configs / "eval").rglob("*.yaml")]  # parts of runs, and lm-eval's tasks
    paths = [path for path in sorted(configs.glob("**/*.yaml")) if path not in others]
    assert len(paths) >= 2
    for path in paths:
        load_config(path, nodes=1)


def test_a_name_says_how_deep_the_model_is(repository: Path) -> None:
    configs = repository / "configs"
    for path in [*configs.glob("*.yaml"), *(configs / "nano").glob("*.yaml")]:
        if depth := re.search(r"vp(?:dense|moe)[0-9_]*_(\d+)\.yaml$", path.name):
            assert load_config(path).model.num_layers == int(depth[1]), path


@pytest.mark.parametrize("name", DESIGNS)
def test_nano_is_the_same_design(repository: Path, name: str) -> None:
    """Only numbers, precision and the run's own names differ: every choice of kind is inherited."""
    full, small = (load_config(repository / "configs" / path) for path in (name, f"nano/{DESIGNS[name]}"))
    free = {"bf16", "recompute_granularity", "run_name", "run_dir", "data_path", "load_weights", "teacher_weights"}
    free |= {"rollout_prompts", "rollout_valid_prompts"}
    for spec in FIELDS:
        pair = [getattr(getattr(cfg, spec.section), spec.name) for cfg in (full, small)]
        if spec.name not in free and any(isinstance(value, str | bool) for value in pair):
            assert pair[0] == pair[1], spec.key
        if spec.section in ("model", "moe"):  # a part that is null at one size is absent from the other
            assert (pair[0] is None) == (pair[1] is None), spec.key


def test_all_problems_come_at_once(child: Write) -> None:
    path = child("model:\n  hiden_size: 64\n  num_layers: many\nmoe:\n  lr: 1\noptimiser: {}\ntraining:\n  bf16: 1\n")
    message = problems(path, "--activation", "relu", "--foo-size", "3", "--seq-length", "stray")
    for expected in (
        f"{path}:3: unknown key model.hiden_size; nearest: model.hidden_size",
        f"{path}:4: model.num_layers = 'many'",
        f"{path}:6: unknown key moe.lr; it belongs under optim:",
        "unknown section optimiser; nearest: optim",
        f"{path}:9: training.bf16 = 1 (int), expected true or false",
        "model.activation = 'relu'",
        "unknown flag --foo-size; nearest:",
        "data.seq_length = 'stray' (str), expected an integer",
    ):
        assert expected in message, message
    assert "8 problems" in message


def test_rules_are_reported_together_and_with_unknown_keys(child: Write) -> None:
    message = problems(child("model:\n  colour: red\n"), "--num-query-groups", "3", "--min-lr", "1.0")
    assert "model.colour" in message
    assert "cannot be shared out evenly over 3 groups" in message
    assert "min_lr 1 is above the peak" in message


def test_missing_fields_are_named_with_what_they_take(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("model:\n  num_layers: 2\n")
    message = problems(path)
    assert "model.hidden_size is missing; it takes an integer" in message
    assert "training.run_name is missing" in message
    assert "model.num_layers" not in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--bf16"], True),
        (["--no-bf16"], False),
        (["--bf16", "false"], False),
        (["--bf16=true"], True),
        (["--bf16", "--micro-batch-size", "2"], True),
    ],
)
def test_boolean_flags(small: Path, flags: list[str], expected: bool) -> None:
    assert load_config(small, flags).training.bf16 is expected


def test_null_and_underscores(small: Path) -> None:
    cfg = load_config(small, ["--eval_interval", "null", "--lr", "1e-3"])
    assert cfg.evaluation.eval_interval is None
    assert cfg.optim.lr == 1e-3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["stray"], "'stray' belongs to no flag"),
        (["--no-bf16", "--bf16"], "--bf16 is given twice"),
        (["--lr", "1e-3", "--lr=1e-3"], "--lr is given twice"),
        (["--lr"], "--lr needs a value"),
        (["--no-lr", "--bf16"], "--no-lr does not fit"),
        (["--train-iters", "1.5"], "training.train_iters = 1.5 (float), expected an integer"),
        (["--train-iters", "0"], "must be at least 1"),
        (["--lr", "nan"], "optim.lr"),
        (["--run-name", "a/b"], "training.run_name = 'a/b'"),
    ],
)
def test_wrong_flags(small: Path, flags: list[str], expected: str) -> None:
    assert expected in problems(small, *flags)


def test_a_chain_of_extends_takes_the_nearest_value(child: Write, tmp_path: Path) -> None:
    child("optim:\n  lr: 5e-3\n  clip_grad: 2.0\n", "middle.yaml")
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text("extends: middle.yaml\noptim: {lr: 6e-3}\n")
    cfg = load_config(leaf, ["--clip-grad", "3"])
    assert (cfg.optim.lr, cfg.optim.clip_grad, cfg.model.num_layers) == (6e-3, 3.0, load_config(leaf).model.num_layers)


def test_of_several_parents_the_later_wins_and_the_file_over_both(child: Write, tmp_path: Path) -> None:
    child("optim: {lr: 5e-3, clip_grad: 2.0, weight_decay: 0.3}\n", "design.yaml")
    (tmp_path / "numbers.yaml").write_text("optim: {lr: 6e-3, clip_grad: 4.0}\n")
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text("extends: [design.yaml, numbers.yaml]\noptim: {lr: 7e-3}\n")
    optim = load_config(leaf).optim
    assert (optim.lr, optim.clip_grad, optim.weight_decay) == (7e-3, 4.0, 0.3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: [loop.yaml]\n", "circle"),
        ("extends: []\n", "a list of them, not []"),
        ("extends: loop.yaml\n", "circle"),
        ("extends: nowhere.yaml\n", "cannot read"),
        ("extends: 3\n", "extends takes one relative path or a list"),
        ("model: [\n", "not valid YAML"),
        pytest.param("model: " + "[" * 9999, "not valid YAML", id="deep"),
        ("- a\n", "mapping of sections"),
        ("model: 3\n", "model is a section of keys, not 3"),
        ("model:\n  num_layers: 1\n  num_layers: 2\n", "given twice"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text(text)
    assert expected in problems(path)


def test_hash_ignores_spelling_and_sees_values(small: Path, child: Write) -> None:
    same = child("optim:\n  lr: 0.01  # as before\n")
    assert config_hash(load_config(same)) == config_hash(load_config(small, ["--lr", "1e-2"]))
    assert config_hash(load_config(small, ["--seed", "7"])) != config_hash(load_config(small))


def test_world_size_is_checked_with_the_rest(small: Path) -> None:
    message = problems(small, "--nproc-per-node", "3", "--num-query-groups", "3", nodes=1)
    assert "3 data-parallel ranks = 24" in message
    assert "3 groups" in message
    cfg = load_config(small, ["--expert-model-parallel-size", "2"])
    check_world(cfg, 2)
    with pytest.raises(ConfigError, match="cannot be divided into expert groups of 2"):
        check_world(cfg, 1)
