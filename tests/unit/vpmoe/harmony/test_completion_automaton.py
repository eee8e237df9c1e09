"""What the automaton accepts is what the parser calls valid, and a model that follows it can sample nothing else."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from harmony_strategies import TEXTS
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.grammar import TokenGrammar
from megatron_vpmoe.generation.prompts import Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.model.builder import build_model
from tests.conftest import fuzz_settings
from tests.tiny import tiny_config
from vpmoe.harmony.grammar import completion_automaton
from vpmoe.harmony.parse import Parser
from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.interface import Tokenizer
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE, load_o200k_harmony

FULL = load_o200k_harmony()
PARSER = Parser(FULL)
FOLLOWING, ACCEPTING = completion_automaton(FULL)
SPECIAL = FULL.special_tokens


def accepted(ids: list[int]) -> bool:
    state = 0
    for token in ids:
        state = int(FOLLOWING[state, token]) if state >= 0 else -1
    return state in ACCEPTING


def spelled(*parts: str | list[int]) -> list[int]:
    """Ids; a part that names a special token is that token, other texts are ordinary, ids are as they are."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, list):
            ids += part
        else:
            ids += [SPECIAL[part]] if part in SPECIAL else FULL.encode_ordinary(part).tolist()
    return ids


def completion(analysis: str | list[int], final: str | list[int]) -> list[int]:
    opening = ("<|channel|>", "analysis", "<|message|>")
    answer = ("<|end|>", "<|start|>", "assistant", "<|channel|>", "final", "<|message|>", final, "<|return|>")
    return spelled(*opening, analysis, *answer)


# Tokens that hold parts of characters, and such as hold white space of every length.
BYTES = {piece: number for number, piece in enumerate(FULL.pieces()[: FULL.first_special_id]) if len(piece) == 1}
SCRAPS = st.lists(st.sampled_from(sorted(BYTES.values())), min_size=1, max_size=4)
BLANKS = st.text(st.sampled_from(" \n\t\u00a0\u0085\u1680\u2003\u2028\u202f\u205f\u3000\u200b\u3001"), max_size=3)


@fuzz_settings(300)
@given(analysis=TEXTS | BLANKS | SCRAPS, final=TEXTS | BLANKS | SCRAPS, split=st.booleans())
def test_it_accepts_what_the_parser_calls_valid(analysis: str | list[int], final: str | list[int], split: bool) -> None:
    """``split``: a token a byte, so that characters come in pieces."""
    if split:
        analysis, final = (
            [BYTES[bytes([byte])] for byte in text.encode()] if isinstance(text, str) else text
            for text in (analysis, final)
        )
    ids = completion(analysis, final)
    assert accepted(ids) == PARSER.judge_completion(ids).valid


@fuzz_settings(200)
@given(st.lists(st.integers(0, 4), max_size=14), st.randoms(use_true_random=False))
def test_it_accepts_nothing_else(edits: list[int], draw: random.Random) -> None:
    """Valid completions with tokens removed, exchanged and put in."""
    ids = completion("2+2=4, 漢字", "4")
    for edit in edits[: 1 + len(edits) // 4]:
        place = draw.randrange(len(ids))
        other = draw.choice([*SPECIAL.values(), *ids, *BYTES.values()])
        ids[place : place + (edit > 0)] = [other] if edit < 3 else []
        if not ids:
            break
    assert accepted(ids) == PARSER.judge_completion(ids).valid


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    counts = np.bincount(FULL.encode_ordinary("What is 37? assistant analysis final 漢字 é"), minlength=VOCAB_SIZE)
    return CompactVocabulary.from_counts(FULL, counts, padded_vocab_size=320)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_whatever_a_model_wants_to_say_is_valid(vocabulary: Tokenizer, temperature: float, single_process) -> None:
    torch.manual_seed(1)
    model = build_model(tiny_config(padded_vocab_size=320))
    grammar = TokenGrammar(*completion_automaton(vocabulary))
    prompt = vocabulary.encode_ordinary("What is 37?").tolist()
    with pytest.raises(DataError, match="shortest sequence has 31"):
        generate(model, [Prompt(prompt)], SamplingOptions(30, ()), grammar=grammar)
    options = SamplingOptions(60, (vocabulary.eod_id,), temperature=temperature, samples=30, top_p=0.98)
    limits = [Prompt(prompt, identity=number, max_new_tokens=31 + number) for number in range(4)]
    completions = generate(model, [*limits, Prompt(prompt)], options, grammar=grammar, rows=16)
    judged = [Parser(vocabulary).judge_completion(one.ids) for one in completions]
    assert [one.reason for one in judged] == [None] * 150
    assert {one.finish for one in completions} == {"stop"}
    assert len(completions[0].ids) == 31
    if temperature:
        assert len({tuple(one.ids) for one in completions}) > 100
