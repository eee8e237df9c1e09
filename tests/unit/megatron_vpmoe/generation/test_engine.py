"""The engine: any company gives each prompt what it would get alone, and a completion says how it came to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_vpmoe.errors import DataError, NonFiniteError
from megatron_vpmoe.generation.decoder import Decoder
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.prompts import Completion, Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.model.attention import backends, self_attention
from megatron_vpmoe.model.attention.masks import SequenceLayout, left_padded
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.replay import recording
from tests.tiny import tiny_config

PROMPTS = [[5, 9, 3], [7] * 17 + [2, 40], [11], [60, 1, 33, 33, 8, 21], [4, 4], [50] * 30, [11], [9, 8, 7, 6]]
STOP = 13


@pytest.fixture
def model(single_process: None) -> VPModel:
    torch.manual_seed(2)
    model = build_model(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter *= 5  # far enough from uniform that greedy tokens vary
    return model


def asked(prompts: list[list[int]] = PROMPTS) -> list[Prompt]:
    return [Prompt(ids) for ids in prompts]


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [one.ids for one in completions]


def logits_of(model: VPModel, tokens: list[int]) -> torch.Tensor:
    layout = SequenceLayout(torch.zeros(1, len(tokens), dtype=torch.int32), torch.arange(len(tokens))[None])
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens]), layout).logits()[0]


def by_full_passes(model: VPModel, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding with no cache, no padding and no batch: one whole pass a token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (tokens[-1] != STOP or len(tokens) == len(prompt)):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_a_batch_gives_each_prompt_what_it_gets_alone(model: VPModel, rows: int) -> None:
    together = generate(model, asked(), SamplingOptions(24, (STOP,)), rows=rows)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert completion.ids == by_full_passes(model, prompt, 24)
        assert completion.finish == ("stop" if completion.ids[-1] == STOP else "length")
    assert len({token for completion in together for token in completion.ids}) > 4


def test_it_stops_at_any_stop_token_and_at_a_prompt_s_own_limit(model: VPModel) -> None:
    free = ids_of(generate(model, asked(), SamplingOptions(12, ())))
    stops = (free[0][5], free[1][2])
    stopped = ids_of(generate(model, asked(), SamplingOptions(12, stops)))
    for one, other in zip(stopped, free, strict=True):
        assert one == other[: next((i + 1 for i, token in enumerate(other) if token in stops), 12)]
    limits = [Prompt(ids, max_new_tokens=1 + number) for number, ids in enumerate(PROMPTS)]
    limited = ids_of(generate(model, limits, SamplingOptions(12, ()), rows=2))
    assert limited == [ids[: 1 + number] for number, ids in enumerate(free)]


def test_draws_depend_on_seed_prompt_sample_and_position_alone(model: VPModel) -> None:
    def drawn(prompts: list[Prompt], rows: int, seed: int = 5) -> list[list[list[int]]]:
        options = SamplingOptions(10, (STOP,), temperature=2.0, top_p=0.9, samples=3, seed=seed)
        completions = generate(model, prompts, options, rows=rows)
        assert [(one.place, one.sample) for one in completions] == [
            (p, s) for p in range(len(prompts)) for s in range(3)
        ]
        return [ids_of(completions[3 * place : 3 * place + 3]) for place in range(len(prompts))]

    first = drawn(asked(), 32)
    assert drawn(asked(), 1) == first
    assert drawn(asked(PROMPTS[::-1]), 4)[::-1] == first
    assert drawn(asked(PROMPTS[3:5]), 5) == first[3:5]
    assert drawn(asked(), 32, seed=6) != first
    assert len({tuple(ids) for group in first for ids in group}) == 3 * (len(PROMPTS) - 1), "equal prompts draw equally"
    one, two, three = drawn([Prompt([11], identity=identity) for identity in (1, 2, 1)], 32)
    assert one == three != two


def test_log_probabilities_are_those_of_a_full_pass(model: VPModel) -> None:
    options = SamplingOptions(9, (), temperature=1.7, top_k=6, samples=2)
    for one in generate(model, asked(), options, rows=3, weight_version=7):
        prompt = PROMPTS[one.place]
        logits = logits_of(model, [*prompt, *one.ids])[len(prompt) - 1 : -1]
        rows = torch.arange(len(one.ids))
        own = logits.log_softmax(-1)[rows, one.ids]
        torch.testing.assert_close(torch.tensor(one.untempered), own, rtol=1e-4, atol=2e-4)
        kept = logits.masked_fill(logits < logits.topk(6).values[:, -1:], -torch.inf)
        drawn = (kept / 1.7).log_softmax(-1)[rows, one.ids]
        torch.testing.assert_close(torch.tensor(one.as_sampled), drawn, rtol=1e-4, atol=2e-4)
        assert one.weight_version == 7


def test_a_completion_tells_where_its_tokens_went(model: VPModel) -> None:
    """Those of its prompt as well, whoever it shared their pass with; the last token was never computed."""
    options = SamplingOptions(5, (STOP,), temperature=1.7, samples=3)
    for one in generate(model, asked(PROMPTS[1:4]), options, rows=4, record_routing=True):
        tokens = [*PROMPTS[1 + one.place], *one.ids]
        with recording(model) as take:
            logits_of(model, tokens)
            wanted = take()  # type: ignore[misc]
        told = torch.from_numpy(np.concatenate(one.routing))
        assert torch.equal(told, wanted[:-1]), (one.place, one.sample)
    assert all(not one.routing for one in generate(model, asked(PROMPTS[:2]), options))


def test_samples_share_their_prompt_s_forward_pass(model: VPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    original = VPModel.forward

    def counted(self: VPModel, tokens: torch.Tensor, *rest: object) -> object:
        computed.append(tokens.numel())
        return original(self, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(VPModel, "forward", counted)
    options = SamplingOptions(5, (), temperature=1.0, samples=5)
    few = generate(model, asked(), options, rows=2)
    assert sum(computed) == sum(len(ids) - 1 for ids in PROMPTS)
    computed.clear()
    many = generate(model, asked(), options, rows=64)
    assert len(computed) == 1 and ids_of(few) == ids_of(many)


def test_no_step_is_computed_for_rows_that_are_done(model: VPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuous batching: the rows of all steps together are the tokens that were asked for, and no row idles."""
    sizes: list[int] = []
    original = Decoder.step

    def counted(self: Decoder, token: torch.Tensor, *rest: object) -> object:
        sizes.append(len(token))
        return original(self, token, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "step", counted)
    limits = [Prompt(ids, max_new_tokens=1 + 5 * (number % 3)) for number, ids in enumerate(PROMPTS)]
    generate(model, limits, SamplingOptions(50, ()), rows=3)
    assert sum(sizes) == sum(1 + 5 * (number % 3) for number in range(len(PROMPTS)))
    assert len(sizes) <= 18  # 43 tokens by three rows, and a tail; batches of three would take 11 + 11 + 6 steps


def test_left_padding_changes_nothing(model: VPModel) -> None:
    tokens, layout = left_padded(PROMPTS, model.device)
    with torch.no_grad():
        padded = model.eval()(tokens, layout).logits()
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(padded[row, -len(prompt) :], logits_of(model, prompt), rtol=1e-4, atol=1e-4)


def test_training_mode_is_restored_and_watching_sees_every_token(model: VPModel) -> None:
    model.train()
    seen: list[tuple[int, int, str | None]] = []
    options = SamplingOptions(4, ())
    generate(model, asked(), options, watch=lambda one: seen.append((one.place, one.ids[-1], one.finish)))
    assert model.training
    for place, ids in enumerate(ids_of(generate(model, asked(), options))):
        assert [entry[1:] for entry in seen if entry[0] == place] == [*((t, None) for t in ids[:3]), (ids[3], "length")]


@pytest.mark.parametrize(
    ("prompts", "rows", "message"),
    [
        ([Prompt([1]), Prompt([])], 4, "empty prompt"),
        ([], 4, "empty prompt"),
        ([Prompt([1], max_new_tokens=-1)], 4, "limits -1"),
        ([Prompt([1])], 0, "0 rows"),
    ],
)
def test_nothing_to_generate_is_refused(model: VPModel, prompts: list[Prompt], rows: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        generate(model, prompts, SamplingOptions(4, ()), rows=rows)


def test_nothing_is_compiled_for_shapes_that_do_not_recur(model: VPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whole sequences go by FlexAttention, which compiles for shapes; those of prompts are always new."""
    expected = ids_of(generate(model, asked(), SamplingOptions(6, (STOP,))))
    ran: list[int] = []

    def compiled(query: torch.Tensor, *_arguments: object) -> torch.Tensor:
        ran.append(query.shape[2])
        return torch.zeros_like(query)

    monkeypatch.setattr(self_attention, "select_backend", lambda *_, **__: "flex")
    monkeypatch.setattr(backends, "flex_attention", compiled)
    assert ids_of(generate(model, asked(), SamplingOptions(6, (STOP,)))) == expected
    assert not ran
    by_full_passes(model, [1, 2, 3], 1)
    assert not ran, "texts that are scored, one after another, are of ever new lengths too"
    tokens = torch.ones(1, 3, dtype=torch.int64)
    model(tokens, SequenceLayout(torch.zeros(1, 3, dtype=torch.int32), tokens, recurs=True))
    assert ran, "training and its evaluation keep the fast kernel"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_diverged_model_is_refused(model: VPModel, temperature: float) -> None:
    torch.nn.init.constant_(model.output_weight()[5], torch.nan)
    with pytest.raises(NonFiniteError, match="new token 0 hold a nan"):
        generate(model, asked(), SamplingOptions(4, (STOP,), temperature=temperature))


def test_a_stop_gives_up_what_is_unfinished(model: VPModel) -> None:
    seen = []
    options = SamplingOptions(40, ())
    done = generate(model, asked(), options, watch=seen.append, stop=lambda: len(seen) >= len(PROMPTS))
    assert done == [] and len(PROMPTS) <= len(seen) < 40
    assert model.training


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_given_completions_are_scored_as_by_full_passes(model: VPModel, rows: int) -> None:
    """Completions of any length behind one prompt, longer than the window; -inf marks what greedy would not choose."""
    likely = by_full_passes(model, PROMPTS[0], 3)
    given = [[likely, [8]], [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [40], [41, 3]], [[STOP, 5]]]
    prompts = [Prompt(ids, given=each) for ids, each in zip(PROMPTS, given, strict=False)]
    scored = generate(model, prompts, SamplingOptions(1, ()), rows=rows)
    assert [(one.place, one.sample) for one in scored] == [
        (p, s) for p, each in enumerate(given) for s in range(len(each))
    ]
    for one in scored:
        before, ids = PROMPTS[one.place], given[one.place][one.sample]
        logits = logits_of(model, [*before, *ids])[len(before) - 1 : -1].log_softmax(-1)
        assert one.ids == ids and one.finish == "length"
        assert one.untempered == pytest.approx(logits[range(len(ids)), ids].tolist(), abs=1e-4)
        greedy = [
            0.0 if token == best else -torch.inf for token, best in zip(ids, logits.argmax(-1).tolist(), strict=True)
        ]
        assert one.as_sampled == greedy
    assert scored[0].as_sampled == [0.0, 0.0, 0.0]


def test_given_completions_are_not_mixed_with_drawn_ones(model: VPModel) -> None:
    for prompts, options in (
        ([Prompt([1], given=[[2]]), Prompt([1])], SamplingOptions(1, ())),
        ([Prompt([1], given=[[2]])], SamplingOptions(1, (), temperature=1.0)),
        ([Prompt([1], given=[[2]])], SamplingOptions(1, (2,))),
    ):
        with pytest.raises(DataError, match="given completions among drawn"):
            generate(model, prompts, options)
    with pytest.raises(DataError, match="limits 0"):
        generate(model, [Prompt([1], given=[[2], []])], SamplingOptions(1, ()))


def test_without_a_cache_the_same_tokens_come(model: VPModel) -> None:
    """Greedy and drawn, in rows that start and end at different times, and beyond one block of columns."""
    for options in (SamplingOptions(6, (STOP,)), SamplingOptions(6, (STOP,), temperature=0.9, seed=3, samples=2)):
        cached, whole = (generate(model, asked(), options, rows=3, cached=how) for how in (True, False))
        assert ids_of(whole) == ids_of(cached)
        for one, other in zip(whole, cached, strict=True):
            assert one.finish == other.finish
            np.testing.assert_allclose(one.untempered, other.untempered, atol=1e-4)
    long = [Prompt([*range(1, 60)] * 2 + [3] * 7)]
    cached, whole = (generate(model, long, SamplingOptions(6, ()), cached=how) for how in (True, False))
    assert ids_of(whole) == ids_of(cached)


def test_without_a_cache_every_token_is_a_pass_over_the_whole_text(model: VPModel) -> None:
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    generate(model, [Prompt([5, 9, 3])], SamplingOptions(4, ()), cached=False)
    hook.remove()
    assert lengths == [3, 4, 5, 6]
    with pytest.raises(DataError, match="recorded routing, and no cache"):
        generate(model, asked(), SamplingOptions(4, ()), cached=False, record_routing=True)
