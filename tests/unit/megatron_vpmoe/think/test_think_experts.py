"""The experts that are language models, and their mixture: causal, apart by document, cached as whole, differentiated
right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vpmoe.config.memory import memory_estimate
from megatron_vpmoe.config.orthogonal import orthogonal_matrices
from megatron_vpmoe.config.parameters import EMBEDDING
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.prompts import Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.generation.state_decoder import RowStates, StateDecoder
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.optim.assignment import assignment_table
from megatron_vpmoe.think.decoding import Entry, Past, empty
from megatron_vpmoe.think.mixture_model import MixtureModel
from megatron_vpmoe.think.recall import Recall, store_of
from ref import state_space as reference
from tests.tiny import MIXTURE, random_batch, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
PLAIN: dict[str, Any] = {"num_experts": None, "window_size": None, "moe_router_num_groups": None}
PLAIN |= {"moe_router_group_topk": None, "num_query_groups": 4, "num_layers": 2, "init_method_std": 0.2}
SMALL: dict[str, dict[str, Any]] = {
    "transformer": {"file": "../think/transformer.yaml", **PLAIN},
    "state_space": {
        "file": "../think/state_space.yaml",
        **PLAIN,
        **{"ssm_inner_size": 24, "ssm_state_size": 4, "ssm_step_rank": 3},
    },
    "mixture": {**MIXTURE, "init_method_std": 0.2},
    "mixture with store": {**MIXTURE, "init_method_std": 0.2},
}
MIXTURES = ("mixture", "mixture with store")
MODELS = list(SMALL)


def lively(name: str, **changes: Any) -> VPModel:
    """In fp64, with every parameter moved off its initial value."""
    torch.manual_seed(0)
    model = build_model(tiny_config(**{**SMALL[name], "bf16": False, **changes})).double().eval()
    if name == "mixture with store":  # which is made of the weights that the model gets here
        model.decoder.latent_attention.read_memory()
        model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return reminded(model) if name == "mixture with store" else model


def reminded(model: VPModel) -> VPModel:
    """A mixture with a store of random documents, in chunks of 4."""
    draw, table = np.random.default_rng(2), model.get_parameter(EMBEDDING)
    assert isinstance(model, MixtureModel)
    model.recall = Recall(store_of(draw.integers(1, 64, (12, 20)), table, chunk=4), entries=3)
    return model


def row(*lengths: int, padding: int = 0) -> tuple[Tensor, SequenceLayout]:
    """Documents of these lengths in one row."""
    document = [number for number, length in enumerate(lengths) for _ in range(length)] + padding * [-1]
    position = [place for length in lengths for place in range(length)] + padding * [0]
    tokens = torch.randint(1, 64, (1, len(document)), generator=torch.Generator().manual_seed(3))
    return tokens, SequenceLayout(torch.tensor([document], dtype=torch.int32), torch.tensor([position]))


def logits(model: VPModel, tokens: Tensor, layout: SequenceLayout) -> Tensor:
    with torch.no_grad():
        return model(tokens, layout).logits()


@pytest.mark.parametrize("name", MODELS)
def test_a_token_changes_nothing_before_it_and_nothing_of_other_documents(name: str) -> None:
    model = lively(name)
    tokens, layout = row(9, 14, 6)
    before = logits(model, tokens, layout)
    for place in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[0, place] = 1 + changed[0, place] % 63
        moved = (logits(model, changed, layout) - before).abs().amax(-1)[0] > 0
        document = layout.document_id[0]
        reachable = (torch.arange(len(document)) >= place) & (document == document[place])
        assert not (moved & ~reachable).any() and moved[reachable].all(), place


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_separate_ones(name: str) -> None:
    model = lively(name)
    lengths = (5, 1, 18, 2)
    tokens, layout = row(*lengths, padding=4)
    packed, begin = logits(model, tokens, layout), 0
    for length in lengths:
        alone = tokens[:, begin : begin + length]
        whole = logits(
            model, alone, SequenceLayout(torch.zeros_like(alone, dtype=torch.int32), torch.arange(length)[None])
        )
        torch.testing.assert_close(packed[:, begin : begin + length], whole, rtol=1e-10, atol=1e-10)
        begin += length


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_batch_are_separate(name: str) -> None:
    model, batch = lively(name), random_batch(3, 48, 64, seed=4)
    together = logits(model, batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
    for n in range(3):
        one = slice(n, n + 1)
        alone = logits(model, batch.tokens[one], SequenceLayout(batch.document_id[one], batch.position_ids[one]))
        torch.testing.assert_close(together[one], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_gives_the_logits_of_whole_texts(name: str) -> None:
    """Rows that begin at different times, with several samples of one prompt, leave, and give their places away."""
    model = lively(name)
    prompts = [Prompt(list(range(1, length + 1))) for length in (1, 7, 3, 1, 12)]
    options = SamplingOptions(max_new_tokens=9, temperature=1.0, stop_ids=tuple(range(40, 64)), samples=2, seed=5)
    cached, whole = (generate(model, prompts, options, rows=3, cached=way) for way in (True, False))
    assert [one.ids for one in cached] == [one.ids for one in whole]
    assert len({len(one.ids) for one in cached}) > 2
    for ours, theirs in zip(cached, whole, strict=True):
        torch.testing.assert_close(torch.tensor(ours.untempered), torch.tensor(theirs.untempered), rtol=1e-6, atol=1e-6)


def test_a_store_is_read_and_an_empty_one_changes_no_bit() -> None:
    model = lively("mixture with store")
    tokens, layout = row(9, 14, 6, padding=2)
    assert isinstance(model, MixtureModel) and model.recall is not None
    with_it, full = logits(model, tokens, layout), model.recall
    model.recall = Recall(store_of([], model.get_parameter(EMBEDDING), chunk=4), entries=3)
    with_nothing = logits(model, tokens, layout)
    model.recall = None
    without = logits(model, tokens, layout)
    assert torch.equal(with_nothing, without)
    moved = (with_it != without).any(-1)[0]
    assert moved.tolist() == [
        at >= full.chunk and document >= 0
        for at, document in zip(layout.position[0].tolist(), layout.document_id[0].tolist(), strict=True)
    ]
    prompts, options = [Prompt([3, 8, 2, 9]), Prompt([5])], SamplingOptions(max_new_tokens=9, stop_ids=())
    plain = generate(model, prompts, options)
    model.recall = Recall(store_of([], model.get_parameter(EMBEDDING), chunk=4), entries=3)
    assert [one.untempered for one in generate(model, prompts, options)] == [one.untempered for one in plain]


def test_weights_that_decoding_tells_are_those_of_the_whole_text() -> None:
    model = lively("mixture")
    prompts, options = [Prompt([3, 8, 2, 9]), Prompt([5])], SamplingOptions(max_new_tokens=6, stop_ids=())
    for prompt, told in zip(prompts, generate(model, prompts, options, record_routing=True), strict=True):
        text = torch.tensor([[*prompt.ids, *told.ids[:-1]]])
        layout = SequenceLayout(torch.zeros_like(text, dtype=torch.int32), torch.arange(text.shape[1])[None])
        with torch.no_grad():
            whole = model(text, layout).expert_weight_BSE[0]
        recorded = torch.cat([torch.from_numpy(piece) for piece in told.routing])
        torch.testing.assert_close(recorded, whole, rtol=1e-6, atol=1e-6)
        assert whole.std(0).max() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_gradients_by_finite_differences(name: str) -> None:
    """Of every parameter, along a random direction; but for the embedding of a mixture, whose scale is a constant."""
    model = lively(name, **({} if name in MIXTURES else {"num_layers": 1})).train()
    batch = random_batch(1, 20, 64, seed=6)
    layout = SequenceLayout(batch.document_id, batch.position_ids)

    def loss() -> Tensor:
        return (model(batch.tokens, layout).logits() * weight).sum()

    weight = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    loss().backward()
    for place, (parameter_name, parameter) in enumerate(model.named_parameters()):
        if name in MIXTURES and parameter_name == EMBEDDING:
            continue
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
        assert parameter.grad is not None
        with torch.no_grad():
            sides = []
            for size in (1e-6, -2e-6):
                parameter.add_(direction, alpha=size)
                sides.append(loss())
            parameter.add_(direction, alpha=1e-6)
        slope, expected = (sides[0] - sides[1]) / 2e-6, (parameter.grad * direction).sum()
        assert abs(slope - expected) < 1e-5 * max(1.0, abs(expected)), parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_nothing(name: str) -> None:
    found = []
    runs = {} if name in MIXTURES else {"recompute_num_layers": 2}
    for changes in ({}, {"recompute_granularity": "full", **runs}):
        model, batch = lively(name, **changes).float().train(), random_batch(2, 48, 64, seed=8)
        output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
        output.cross_entropy(batch.labels, batch.loss_mask, torch.ones(2, 48))[0].backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for parameter_name, gradient in found[0].items():
        assert gradient is not None and gradient.any() and torch.equal(gradient, found[1][parameter_name])


@pytest.mark.parametrize("name", MODELS)
def test_the_first_loss_is_that_of_knowing_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(
        tiny_config(**{**SMALL[name], "init_method_std": 0.02, "bf16": False, "padded_vocab_size": 512})
    )
    batch = random_batch(2, 48, 512, seed=9)
    output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
    even = torch.full((2, 48), 1 / int(batch.loss_mask.sum()))
    assert output.cross_entropy(batch.labels, batch.loss_mask, even)[0].item() == pytest.approx(6.24, abs=0.1)  # ln 512


def test_state_space_is_its_formulas() -> None:
    model = lively("state_space")
    tokens, layout = row(6, 13, 1, padding=3)
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    expected = reference.logits(
        state, tokens[0].tolist(), layout.document_id[0].tolist(), model.config.layernorm_epsilon
    )
    torch.testing.assert_close(logits(model, tokens, layout)[0, :20], expected[:20], rtol=1e-9, atol=1e-9)


def test_first_steps_are_of_the_range(single_process: None) -> None:
    model = build_model(tiny_config(**{**SMALL["state_space"], "ssm_inner_size": 4096}))
    steps = torch.nn.functional.softplus(model.decoder.layers[0].mixer.dt_bias.detach()).log()  # type: ignore[union-attr]
    low, high = torch.tensor([1e-3, 1e-1]).log()
    assert steps.min() > low - 1e-3 and steps.max() < high + 1e-3
    assert abs(steps.mean() - (low + high) / 2) < 0.1, "log-uniform"


def test_normuon_has_the_matrices_that_are_counted() -> None:
    cfg = tiny_config(**{**SMALL["state_space"], "optimizer": "normuon"})
    rows = assignment_table(build_model(cfg, device=torch.device("meta")), cfg)
    counted, routed = orthogonal_matrices(cfg, range(1, 3))
    assert sum(row.matrices for row in rows) == counted.total() == 2 * 7 and not routed
    sizes = sum(row.shape[0] * row.shape[1] for row in rows if row.optimizer == "normuon")
    assert sizes == sum(count * height * width for (height, width), count in counted.items())


def test_bf16_keeps_decay_and_scan_wide() -> None:
    torch.manual_seed(1)
    narrow = build_model(tiny_config(**{**SMALL["state_space"], "bf16": True})).eval()
    kept = {name.rsplit(".", 1)[1] for name, p in narrow.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_bias"}
    torch.manual_seed(1)
    wide = build_model(tiny_config(**{**SMALL["state_space"], "bf16": False})).eval()
    tokens, layout = row(40)
    expected = logits(wide, tokens, layout)
    assert (logits(narrow, tokens, layout) - expected).abs().max() < 2e-2 * expected.abs().max()


def test_the_state_of_a_text_does_not_grow() -> None:
    model = lively("state_space").float()
    cache = StateDecoder(model).cache(2)
    size = cache.nbytes
    cache.reserve(5000)
    assert cache.nbytes == size == 2 * 2 * 24 * (4 + 3) * 4  # layers, rows, channels, state and inputs, fp32


def test_growing_entries_keep_a_column_a_position() -> None:
    entries = {(1, "latent"): Entry((3,), torch.float32, grows=True)}
    states = RowStates(entries, empty(entries, 2, 0, torch.device("cpu")))
    kept = torch.arange(15.0).view(5, 3)
    states.reserve(5)
    states.fill(1, {(1, "latent"): kept})
    states.reserve(300)
    states.move(1, 0)
    stored = states.of_layer(1, 2)["latent"]
    assert stored.shape[1] >= 300 and torch.equal(stored[0, :5], kept)


def test_past_knows_each_document() -> None:
    _, layout = row(3, 1, 2, padding=2)
    assert Past.of(layout).ends == (2, 3, 5)


def test_a_model_that_reads_a_store_is_not_built_without() -> None:
    cfg = tiny_config(**SMALL["mixture"])
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"memory_entries": 3})})
    with pytest.raises(ConfigError, match="reads 3 entries of a store, and none is named"):
        build_model(cfg)


@pytest.mark.parametrize(("name", "least"), [("state_space", 0.7), ("mixture", 0.5)])
def test_memory_of_other_layers_is_estimated(name: str, least: float) -> None:
    """Of what they keep for the backward pass, counted; in attention a mask for each layer and head is estimated."""
    cfg = tiny_config(**{**SMALL[name], "bf16": False, "num_layers": 4, "seq_length": 96})
    model, batch = build_model(cfg).train(), random_batch(2, 96, 64, seed=2)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
    assert output is not None
    estimate = memory_estimate(cfg, on_cpu=True).parts["activations"]
    assert least < sum(kept.values()) / estimate < 1.15
