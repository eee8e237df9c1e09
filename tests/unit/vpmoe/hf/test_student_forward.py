"""The student's code for ``transformers``: arguments, outputs, caches and fresh weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache, StaticCache

from tests.tiny_hf_student import GREEDY, ROWS, SMALL, WINDOW, alone, flat, model_of, tokens
from vpmoe.hf.configuration_vpmoe import VpMoeConfig
from vpmoe.hf.modeling_vpmoe import VpMoeForCausalLM, VpMoeModel


@pytest.fixture(scope="module")
def model() -> VpMoeForCausalLM:
    return model_of()


def test_unknown_arguments_are_refused_by_name(model: VpMoeForCausalLM) -> None:
    ids = torch.tensor([tokens(4)])
    for part in (model, model.model):
        for name in ("attention_masks", "cu_seq_lens_q", "token_type_ids"):
            with pytest.raises(TypeError, match=name):
                part(ids, **{name: ids})
    with pytest.raises(ValueError, match="attention_masks"):
        model.generate(ids, attention_masks=ids, **GREEDY)


def test_hidden_states_and_attentions(model: VpMoeForCausalLM) -> None:
    ids, positions = flat([ROWS[0]])
    of_layers: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda *call: of_layers.append(call[2][0])) for layer in model.model.layers]
    found = model(ids, position_ids=positions, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    states = found.hidden_states
    assert isinstance(states, tuple) and len(states) == model.config.num_hidden_layers + 1
    assert torch.equal(states[0], model.model.embed_tokens(ids))
    assert all(torch.equal(state, layer) for state, layer in zip(states[1:-1], of_layers[:-1], strict=True))
    assert torch.equal(states[-1], model.model.norm(of_layers[-1]))
    assert torch.equal(found.logits, model.lm_head(states[-1]))
    assert len(found.attentions) == model.config.num_hidden_layers
    document = torch.tensor([[n for n, d in enumerate(ROWS[0]) for _ in d]])
    apart = document[:, :, None] != document[:, None, :]
    distance = torch.arange(16)[:, None] - torch.arange(16)
    for number, weight in enumerate(found.attentions, 1):
        unseen = apart | (distance < 0) | ((distance >= WINDOW) & (number % 2 == 1))
        assert weight.shape == (1, 4, 16, 16)
        assert (weight[unseen[:, None].expand_as(weight)] == 0).all()
        assert (weight[~unseen[:, None].expand_as(weight)] > 0).all()
        assert (weight.sum(-1) < 1).all()  # the rest is the sink's
    assert model(ids).hidden_states is None and model(ids).attentions is None
    base = model.model(ids, position_ids=positions, output_hidden_states=True)
    assert torch.equal(base.hidden_states[-1], base.last_hidden_state)


def test_outputs_as_a_tuple(model: VpMoeForCausalLM) -> None:
    ids = torch.tensor([tokens(6)])
    loss, logits, cache = model(ids, labels=ids, return_dict=False)
    expected = model(ids, labels=ids)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
    assert cache.get_seq_length() == 6
    assert torch.equal(model.model(ids, return_dict=False)[0], model.model(ids).last_hidden_state)


def test_losses_and_kept_logits(model: VpMoeForCausalLM) -> None:
    ids = torch.tensor([tokens(8, 1), tokens(8, 2)])
    labels = ids.masked_fill(torch.arange(8) < 3, -100)
    found = model(ids, labels=labels)
    expected = functional.cross_entropy(found.logits[:, 2:-1].flatten(0, 1), ids[:, 3:].flatten())
    torch.testing.assert_close(found.loss, expected)
    shifted = functional.pad(ids[:, 1:], (0, 1), value=9).masked_fill(torch.arange(8) == 7, 9)
    torch.testing.assert_close(
        model(ids, shift_labels=shifted, ignore_index=9).loss,
        functional.cross_entropy(found.logits.flatten(0, 1), shifted.flatten(), ignore_index=9),
    )
    for kept, places in ((1, slice(-1, None)), (3, slice(-3, None)), (torch.tensor([0, 5]), [0, 5])):
        assert torch.equal(model(ids, logits_to_keep=kept).logits, model.lm_head(model.model(ids)[0][:, places]))


PADDED = {
    "input_ids": torch.tensor([[0] * 8 + tokens(3, 1), tokens(11, 2)]),
    "attention_mask": torch.tensor([[0] * 8 + [1] * 3, [1] * 11]),
}
SHORT = {"input_ids": torch.tensor([tokens(2, 1)]), "attention_mask": torch.tensor([[1, 1]])}


@pytest.mark.parametrize("given", [PADDED, SHORT], ids=["padded, past the window", "short of the window"])
@pytest.mark.parametrize("beams", [1, 2])
def test_every_cache_generates_what_none_does(model: VpMoeForCausalLM, beams: int, given: dict[str, Any]) -> None:
    options = {**GREEDY, "num_beams": beams}
    expected: Any = model.generate(**given, use_cache=False, **options)
    assert len({*expected[-1].tolist()}) > 3
    ways: list[dict[str, Any]] = [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"past_key_values": DynamicCache()},
        {"past_key_values": DynamicCache(config=model.config)},
        {"past_key_values": StaticCache(config=model.config, max_cache_len=30)},
        {"prefill_chunk_size": 3},
    ]
    for way in ways:
        assert torch.equal(model.generate(**given, **way, **options), expected), way


def test_a_static_cache_in_pieces(model: VpMoeForCausalLM) -> None:
    """Pieces that end below the window, at it and over it; and a restart."""
    ids, positions = flat([[tokens(10, 1), tokens(8, 2)]])
    expected = torch.cat([alone(model, tokens(10, 1)), alone(model, tokens(8, 2))])
    for sizes in ([2, 2, 5, 1, 8], [3, 15], [1] * 18, [18]):
        cache, found = StaticCache(config=model.config, max_cache_len=25), []
        for piece, places in zip(ids.split(sizes, 1), positions.split(sizes, 1), strict=True):
            with torch.no_grad():
                found.append(model(piece, position_ids=places, past_key_values=cache).logits[0])
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)


def test_compiling_steps_is_refused(model: VpMoeForCausalLM) -> None:
    from transformers import CompileConfig

    with pytest.raises(ValueError, match="compile_config"):
        model.generate(**PADDED, cache_implementation="static", compile_config=CompileConfig(), **GREEDY)


@pytest.mark.parametrize("kept", [VpMoeForCausalLM, VpMoeModel])
def test_fresh_weights(kept: type[VpMoeForCausalLM] | type[VpMoeModel]) -> None:
    """Matrices and stacks of them by ``initializer_range``, the rest where training starts it."""
    torch.manual_seed(1)
    config = VpMoeConfig(**{**SMALL, "hidden_size": 64, "vocab_size": 512, "initializer_range": 0.05})
    model = kept._from_config(config)
    seen = set()
    for name, tensor in model.state_dict().items():
        last = name.rsplit(".", 1)[-1]
        seen.add(last)
        if last == "grape_log_freq":
            frequency = torch.exp(tensor / config.grapem_log_freq_scale)
            torch.testing.assert_close(frequency, config.rotary_base ** (-torch.arange(4) / 4.0))
        elif last == "value_residual_scale" or "norm" in name:
            assert (tensor == 1).all(), name
        elif last == "sink" or last.endswith("bias"):
            assert (tensor == 0).all(), name
        else:
            assert tensor.dim() in (2, 3), name
            each = tensor.unbind() if tensor.dim() == 3 else [tensor]
            for matrix in each:
                # Six standard errors of a standard deviation and of a mean.
                spread = 6 * config.initializer_range / math.sqrt(matrix.numel())
                assert abs(matrix.std().item() - config.initializer_range) < spread / math.sqrt(2), name
                assert abs(matrix.mean().item()) < spread, name
    assert {"fc1_weight", "fc2_weight", "fc1_bias", "sink", "expert_bias", "value_residual_scale"} <= seen


def test_weights_missing_from_a_folder_are_fresh_and_the_others_are_kept(
    model: VpMoeForCausalLM, tmp_path: Any
) -> None:
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(("sink", "fc1_weight"))}
    model.save_pretrained(tmp_path, state_dict=state)
    again: Any = VpMoeForCausalLM.from_pretrained(tmp_path)
    loaded = again.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    fresh = loaded["model.layers.1.mlp.experts.fc1_weight"]
    assert abs(fresh.std().item() - model.config.initializer_range) < 0.004
    assert (loaded["model.layers.1.self_attention.sink"] == 0).all()
