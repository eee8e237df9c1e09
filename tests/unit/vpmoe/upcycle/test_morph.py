"""Rung 4: what the ledger calls exact is exact, constant factors are the best there are, sinks have their mass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_config
from tests.unit.vpmoe.upcycle.tiny_rungs import PLAIN, TEXT, dense_config, make, object_of, random_weights
from vpmoe.errors import UpcycleError
from vpmoe.hf.tokenizer_files import open_tokenizer
from vpmoe.upcycle import morph
from vpmoe.upcycle.constant_factors import constant_factors, relative_error
from vpmoe.weights.geometry import config_of, geometry_of, load_model, process_groups

SIZES = {"num_layers": 2, "padded_vocab_size": 320, "num_attention_heads": 4, "num_query_groups": 2}
CALIBRATION = [TEXT, TEXT[20:]]
SETTINGS: dict[str, Any] = {"calibration_texts": CALIBRATION, "texts": [TEXT[9:], TEXT[30:]]}
SETTINGS |= {"prompt_lengths": [1, 4], "text_tokens": 12, "batch_tokens": 12}


@pytest.mark.slow
def test_the_ledger(tmp_path: Path) -> None:
    plain = tiny_config(**PLAIN | SIZES)
    below = object_of(tmp_path, "below", plain, random_weights(plain))
    new = dense_config(**SIZES, tpa_rank=2, tpa_q_rank=4)
    report, weights = make(tmp_path, "morph", new, below, **SETTINGS)
    found = report["verification"]
    exact = {name for name, entry in found["switches"].items() if entry["exact_on_short_prompts"]}
    assert exact == {"tpa", "local_position_embedding", "value_residual", "window_size", "all_exact"}
    for name, entry in found["switches"].items():
        if name in exact:
            assert entry["logit_difference"] <= 1e-4
        else:
            assert entry["logit_difference"] > 1e-2, name
    # Only the window is felt on texts longer than it; alone and with the other exact ones the same.
    costs = {name: entry["cost"] for name, entry in found["switches"].items()}
    assert max(abs(costs[name]) for name in ("tpa", "local_position_embedding", "value_residual")) < 1e-4
    assert abs(costs["window_size"]) > 1e-3 and costs["all_exact"] == pytest.approx(costs["window_size"], abs=1e-4)
    assert found["loss_after"] != pytest.approx(found["loss_before"], abs=1e-4)
    assert report["conversion"]["factor_errors"] == {"1": {"q": 0.0, "k": 0.0, "v": 0.0}}
    tokenizer = open_tokenizer(below.hf)
    texts = [tokenizer(text)["input_ids"][:12] for text in CALIBRATION]
    for number in (1, 2):
        assert mean_sink_mass(new, weights, number, texts) == pytest.approx(0.01, abs=2e-5)


def mean_sink_mass(cfg: Any, weights: Any, number: int, texts: list[list[int]]) -> float:
    """With values of one, what a layer's attention gives is what its sinks leave."""
    from megatron_vpmoe.model.attention.masks import left_padded

    given: list[torch.Tensor] = []
    with process_groups(), torch.no_grad():
        model = load_model(config_of(geometry_of(cfg), source=""), weights, source="")
        attention: Any = model.decoder.layers[number - 1].self_attention
        mix = attention._mix_value
        attention._mix_value = lambda value, first: torch.ones_like(mix(value, first))
        attention.linear_proj.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0].flatten(0, 1)))
        for text in texts:
            model(*left_padded([text], torch.device("cpu")))
    return 1 - float(torch.cat(given).mean())


@pytest.mark.slow
def test_lower_ranks_are_reported_and_not_called_exact(tmp_path: Path) -> None:
    plain = tiny_config(**PLAIN | SIZES)
    below = object_of(tmp_path, "below", plain, random_weights(plain))
    report, _ = make(tmp_path, "morph", dense_config(**SIZES, tpa_rank=1, tpa_q_rank=3), below, **SETTINGS)
    errors = report["conversion"]["factor_errors"]["1"]
    assert all(0.1 < error < 1 for error in errors.values())
    tpa = report["verification"]["switches"]["tpa"]
    assert not tpa["exact_on_short_prompts"] and tpa["logit_difference"] > 1e-2
    assert report["verification"]["switches"]["all_exact"]["logit_difference"] <= 1e-4


def test_constant_factors() -> None:
    heads = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(heads.flatten(1), full_matrices=False)
    for rank in range(1, 7):
        factor_a, factor_b = constant_factors(heads, rank)
        assert factor_a.shape == (4, rank) and factor_b.shape == (rank, 3, 5)
        product = (factor_a @ factor_b.flatten(1)) / rank
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(product, best)
        lost = float((heads.flatten(1) - best).norm() / heads.norm())
        assert relative_error(heads, rank) == pytest.approx(lost, abs=1e-12)
        assert bool((factor_b.flatten(1).norm(dim=1) > 0).all())


@pytest.mark.slow
def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_config(**PLAIN | SIZES)
    weights = random_weights(plain)
    below = object_of(tmp_path, "below", plain, weights)
    new = dense_config(**SIZES, tpa_rank=2, tpa_q_rank=4)
    with pytest.raises(UpcycleError, match="must fit into the window"):
        make(tmp_path, "morph", new, below, **SETTINGS | {"prompt_lengths": [5]})
    with pytest.raises(UpcycleError, match="has no two tokens"):
        make(tmp_path, "morph", new, below, **SETTINGS | {"texts": ["t"]})
    # A switch that is called exact and is not.
    monkeypatch.setattr(morph, "initial_log_frequencies", lambda dim, _base, _scale: torch.zeros(dim // 2))
    with pytest.raises(UpcycleError, match="an exact switch moves the logits by"):
        make(tmp_path, "morph", new, below, **SETTINGS)
    assert not (tmp_path / "made").exists()
