"""What may change between stopping and resuming, and what may not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_vpmoe.config import RunConfig, deciding_fields, load_config, provenance_diff
from megatron_vpmoe.config.provenance import _SINGLE_FIELDS, _UNDECIDING, _WHOLE_SECTIONS, is_binding
from megatron_vpmoe.config.schema import RETIRED, fields, section_types
from megatron_vpmoe.config.schema_objective import OWNED
from megatron_vpmoe.errors import ConfigError


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("--num-layers 4", "model.num_layers: 8 -> 4"),
        ("--moe-router-topk 2", "moe.moe_router_topk: 4 -> 2"),
        ("--optimizer adam", "optim.optimizer: 'normuon' -> 'adam'"),
        ("--data-seed 1", "data.data_seed: 1234 -> 1"),
        ("--global-batch-size 32", "training.global_batch_size: 16 -> 32"),
        ("--seed 1", "training.seed: 1234 -> 1"),
        ("--bf16", "training.bf16: False -> True"),
    ],
)
def test_binding_fields(small: Path, flags: str, changed: str) -> None:
    old, new = load_config(small), load_config(small, flags.split())
    assert [str(change) for change in provenance_diff(old.model_dump(), new.model_dump())] == [changed]


def test_replayed_routing_binds(small: Path) -> None:
    sampled = ["--objective", "grpo", "--eval-interval", "null", "--rewards", "[{function: finished}]"]
    old, new = load_config(small, sampled), load_config(small, [*sampled, "--router-replay", "replay"])
    changes = provenance_diff(old.model_dump(), new.model_dump())
    assert [str(change) for change in changes] == ["rollouts.router_replay: 'off' -> 'replay'"]
    earlier = old.model_dump()
    del earlier["rollouts"]["router_replay"]
    assert provenance_diff(earlier, load_config(small, [*sampled, "--router-replay", "off"]).model_dump()) == []


@pytest.mark.parametrize(
    "flags",
    [
        "--log-interval 3 --save-interval 50 --eval-interval 7",
        "--nproc-per-node 1 --expert-model-parallel-size 2 --micro-batch-size 4",
        "--run-dir elsewhere --data-path other --wandb-mode disabled",
        "--lr 5e-3 --train-iters 800 --resume --attention-backend reference",
    ],
)
def test_operational_fields_are_free(small: Path, flags: str) -> None:
    old, new = load_config(small), load_config(small, flags.split())
    assert old != new
    assert provenance_diff(old.model_dump(), new.model_dump()) == []


def test_a_field_of_one_side_only_counts(small: Path) -> None:
    new = load_config(small).model_dump()
    old = {section: dict(values) for section, values in new.items()}
    del old["model"]["tpa"]
    old["moe"]["bygone"] = 3
    keys = [change.key for change in provenance_diff(old, new)]
    assert sorted(keys) == ["model.tpa", "moe.bygone"]


def test_a_run_from_before_a_field_went_is_resumed_and_its_geometry_read(
    small: Path, child: Callable[..., Path]
) -> None:
    new = load_config(small)
    old = new.model_dump()
    for name, retired in RETIRED.items():
        old[retired.section][name] = 0.0 if retired.value is ... else retired.value
    assert provenance_diff(old, new.model_dump()) == []
    assert RunConfig.model_validate(old) == RunConfig.model_validate_json(json.dumps(old)) == new
    for broken in ([], {"model": []}):
        with pytest.raises(ValidationError):
            RunConfig.model_validate(broken)
    assert load_config(child("parallel: {context_parallel_size: 1}")) == new
    for name, retired in ((name, retired) for name, retired in RETIRED.items() if retired.value is not ...):
        with pytest.raises(ConfigError) as caught:
            load_config(child(f"{retired.section}: {{{name}: [another]}}"))
        assert f"unknown key {retired.section}.{name}; it is gone: {retired.reason}" in str(caught.value)


@pytest.mark.parametrize(("then", "now"), [(True, 1), (False, 0)])
def test_a_field_is_read_by_its_old_name(
    small: Path, child: Callable[..., Path], tmp_path: Path, then: bool, now: int
) -> None:
    new = load_config(small, ["--first-dense-layers", str(now)])
    old = new.model_dump()
    del old["moe"]["first_dense_layers"]
    old["moe"]["first_layer_dense"] = then
    assert provenance_diff(old, new.model_dump()) == []
    assert RunConfig.model_validate(old) == new
    (tmp_path / "old.yaml").write_text(json.dumps(old))
    assert load_config(tmp_path / "old.yaml") == new
    with pytest.raises(ConfigError, match=r"first_layer_dense; it is moe\.first_dense_layers now \(0 for False, 1 for"):
        load_config(child(f"moe: {{first_layer_dense: {str(then).lower()}, first_dense_layers: 1}}"))


@pytest.mark.parametrize(
    ("objective", "flags", "key"),
    [
        ("dpo", "--dpo-beta 0.2", "training.dpo_beta"),
        ("topk_kd", "--kd-alpha 0.2", "training.kd_alpha"),
        ("topk_kd", "--teacher-weights a", "training.teacher_weights"),
    ],
)
def test_settings_of_an_objective_bind_and_concern_no_other(small: Path, objective: str, flags: str, key: str) -> None:
    new, other = (load_config(small, ["--objective", objective, *words]) for words in ([], flags.split()))
    old = new.model_dump()
    for name in [name for name, owners in OWNED.items() if objective in owners]:
        del old["training"][name]
    assert provenance_diff(old, new.model_dump()) == []
    assert [change.key for change in provenance_diff(old, other.model_dump())] == [key]
    assert deciding_fields(new) != deciding_fields(other)
    assert not OWNED.keys() & deciding_fields(load_config(small))["training"].keys()


def test_a_served_teacher_is_its_name_and_not_its_address(small: Path) -> None:
    def named(name: str, address: str, *more: str) -> RunConfig:
        words = ["--objective", "topk_kd", "--served-model", name, "--teacher-server", address]
        return load_config(small, [*words, *more])

    one, moved = named("gpt-oss", "http://a:1"), named("gpt-oss", "http://b:2/v1", *TUNED)
    assert provenance_diff(one.model_dump(), moved.model_dump()) == []
    assert deciding_fields(one) == deciding_fields(moved)
    other = named("another", "http://a:1")
    assert [change.key for change in provenance_diff(one.model_dump(), other.model_dump())] == ["training.served_model"]
    assert deciding_fields(one) != deciding_fields(other)


TUNED = ["--teacher-timeout", "5", "--teacher-concurrency", "2", "--teacher-tokenizer", "x"]


def test_what_answers_are_sampled_by_binds_and_concerns_nothing_else(small: Path) -> None:
    sampled = ["--objective", "grpo", "--rewards", "[{function: finished}]", "--eval-interval", "null"]
    changes = {
        "rollouts.rollout_temperature": ["--rollout-temperature", "0.7"],
        "training.grpo_clip_high": ["--grpo-clip-high", "0.2"],
    }
    new = load_config(small, sampled)
    old = {section: dict(values) for section, values in new.model_dump().items()}
    for name in [name for name in old["training"] if name.startswith("grpo_")]:
        del old["training"][name]
    old["rollouts"] = {"rewards": old["rollouts"]["rewards"]}
    assert provenance_diff(old, new.model_dump()) == []
    for key, flags in changes.items():
        other = load_config(small, [*sampled, *flags])
        assert [change.key for change in provenance_diff(old, other.model_dump())] == [key]
        assert deciding_fields(new) != deciding_fields(other)
    assert not {"rollouts", "grpo"} & set(re.findall(r"[a-z]+", str(deciding_fields(load_config(small)))))


def test_the_classification_names_fields_that_exist() -> None:
    undeciding = {section: names or frozenset() for section, names in _UNDECIDING.items()}
    for section, names in [*_WHOLE_SECTIONS.items(), *_SINGLE_FIELDS.items(), *undeciding.items()]:
        assert names <= set(section_types()[section].model_fields)
    assert any(is_binding(spec.section, spec.name) for spec in fields().values())


@pytest.mark.parametrize("flags", ["--lr 5e-3", "--train-iters 800", "--seed 1", "--num-layers 4", "--data-seed 1"])
def test_what_decides_the_weights_is_in_the_key(small: Path, flags: str) -> None:
    assert deciding_fields(load_config(small)) != deciding_fields(load_config(small, flags.split()))


@pytest.mark.parametrize(
    "flags",
    [
        "--log-interval 3 --save-interval 50 --eval-interval 7 --wandb-mode disabled",
        "--run-name other --run-dir elsewhere --data-path other --resume --attention-backend reference",
        "--micro-batch-size 4 --recompute-granularity full --normuon-stack-mib 8 --distributed-timeout-minutes 3",
    ],
)
def test_what_is_operational_is_not(small: Path, flags: str) -> None:
    assert load_config(small) != load_config(small, flags.split())
    assert deciding_fields(load_config(small)) == deciding_fields(load_config(small, flags.split()))
