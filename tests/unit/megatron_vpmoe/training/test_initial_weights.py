"""A run that starts from weights has them, or says why it cannot."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from megatron_vpmoe.errors import CheckpointError, NonFiniteError
from tests.tiny import tiny_config
from vpmoe.weights.geometry import expected_shapes, geometry_of
from vpmoe.weights.megatron_checkpoint import write_checkpoint
from vpmoe.weights.tensors import LazyTensor

SMALL = {"num_layers": 2, "num_experts": None}


def test_weights_arrive_and_another_model_is_refused(single_process, tmp_path: Path) -> None:
    from megatron_vpmoe.model.builder import build_model
    from megatron_vpmoe.training.initial_weights import load_initial_weights

    cfg = tiny_config(**SMALL, load_weights=tmp_path)
    source = build_model(cfg)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    state = {name: value for name, value in source.state_dict().items() if isinstance(value, torch.Tensor)}
    weights = {name: LazyTensor.of(value) for name, value in state.items()}
    path, _ = write_checkpoint(tmp_path, weights, {"config": geometry_of(cfg)})

    model = build_model(cfg)
    assert load_initial_weights(model, cfg).path == path
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name in state)

    # Idle in a dense model, or of training only.
    free = tiny_config(**SMALL, load_weights=tmp_path, moe_router_topk=4, init_method_std=0.1)
    load_initial_weights(build_model(free), free)

    other = tiny_config(**SMALL, load_weights=tmp_path, window_size=4)
    with pytest.raises(CheckpointError, match=r"model\.window_size: 8 -> 4"):
        load_initial_weights(build_model(other), other)
    nowhere = tiny_config(**SMALL, load_weights=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_initial_weights(model, nowhere)

    state["decoder.final_layernorm.weight"][3] = torch.inf
    path, _ = write_checkpoint(tmp_path / "diverged", weights, {"config": geometry_of(cfg)})
    with pytest.raises(NonFiniteError, match=r"decoder\.final_layernorm\.weight: 1 of \d+ values are not finite"):
        load_initial_weights(model, tiny_config(**SMALL, load_weights=path))


def test_an_embedding_arrives_alone_from_another_geometry(single_process, tmp_path: Path) -> None:
    from megatron_vpmoe.model.builder import build_model
    from megatron_vpmoe.training.initial_weights import load_initial_embedding

    source = tiny_config(**SMALL)
    state = {n: v.normal_() for n, v in build_model(source).state_dict().items() if isinstance(v, torch.Tensor)}
    weights = {name: LazyTensor.of(value) for name, value in state.items()}
    path, _ = write_checkpoint(tmp_path, weights, {"config": geometry_of(source)})
    cfg = tiny_config(**{**SMALL, "num_layers": 3}, load_embedding=tmp_path)
    model = build_model(cfg)
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert load_initial_embedding(model, cfg).path == path
    embedding = "embedding.word_embeddings.weight"
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert changed == [embedding] and torch.equal(model.get_parameter(embedding), state[embedding])
    narrow = tiny_config(**{**SMALL, "padded_vocab_size": 72}, load_embedding=tmp_path)
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight: \(64, 32\) -> \(72, 32\)"):
        load_initial_embedding(build_model(narrow), narrow)


def test_missing_tensors_are_named(single_process, tmp_path: Path) -> None:
    from megatron_vpmoe.model.builder import build_model
    from megatron_vpmoe.training.initial_weights import load_initial_weights

    cfg = tiny_config(**SMALL, load_weights=tmp_path)
    narrow = tiny_config(**{**SMALL, "hidden_size": 40})
    weights = {name: LazyTensor.of(torch.zeros(shape)) for name, shape in expected_shapes(narrow).items()}
    path, _ = write_checkpoint(tmp_path, weights, {"config": geometry_of(narrow)})
    # As if another version had written it: what it says is this model, what it holds is not.
    state = json.loads((path / "run_state.json").read_text())
    (path / "run_state.json").write_text(json.dumps({**state, "config": geometry_of(cfg)}))
    files = json.loads((path / "files.json").read_text())
    content = (path / "run_state.json").read_bytes()
    files["run_state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "files.json").write_text(json.dumps(files))
    with pytest.raises(CheckpointError) as caught:
        load_initial_weights(build_model(cfg), cfg)
    assert "embedding.word_embeddings.weight: (64, 40) -> (64, 32)" in str(caught.value)
    assert "more" in str(caught.value)


@pytest.mark.parametrize("section", ["model", None])
def test_a_missing_field_of_the_weights_is_named(section: str | None, tmp_path: Path) -> None:
    from megatron_vpmoe.training.checkpoint import Found
    from megatron_vpmoe.training.initial_weights import _stored_config

    cfg = tiny_config(**SMALL)
    config = geometry_of(cfg)
    config["model"].pop("hidden_size")
    found = Found(tmp_path, {"config": config if section else {}})
    with pytest.raises(CheckpointError, match="model.hidden_size is missing" if section else "config.model") as caught:
        _stored_config(found.state.get("config"), cfg, "there")
    assert "version" not in str(caught.value)
