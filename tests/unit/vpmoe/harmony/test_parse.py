"""Parsing is the inverse of rendering, and refuses everything that rendering does not write."""

from pathlib import Path

import pytest
from harmony_strategies import conversations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vpmoe.data.pieces import TokenPieces
from megatron_vpmoe.sources.form import Form
from tests.learned_vocabulary import write_vocabulary
from vpmoe.errors import HarmonyError, TokenizerError
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.grammar import completion_automaton
from vpmoe.harmony.parse import Parser, spans_of
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.harmony.spans import documents
from vpmoe.tokenizer.hf_directory import HFDirectory
from vpmoe.tokenizer.interface import Tokenizer

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
ANALYSIS = "<|start|>assistant<|channel|>analysis<|message|>2+2=4<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>4<|return|>"
VALID = "<|start|>user<|message|>2 + 2?<|end|>" + ANALYSIS + FINAL


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of ``text`` with special spellings taken as special tokens, which no encoder of ours does."""
    ids: list[int] = []
    while text:
        at, spelling = min(((text.find(s), s) for s in tokenizer.special_tokens if s in text), default=(len(text), ""))
        ids += tokenizer.encode_ordinary(text[:at]).tolist()
        if spelling:
            ids.append(tokenizer.special_id(spelling))
        text = text[at + len(spelling) :]
    return ids


@SHARED
@given(messages=conversations())
def test_render_then_parse_gives_the_messages_and_their_spans(
    tokenizer: Tokenizer, messages: tuple[Message, ...]
) -> None:
    rendered = FastRenderer(tokenizer).render(messages)
    parser = Parser(tokenizer)
    assert parser.messages(rendered.tokens()) == messages
    tokens, span, _ = documents((rendered,), tokenizer.eod_id)
    assert spans_of(parser.parse(tokens[:-1]), len(tokens)).tolist() == span.tolist()


@SHARED
@given(messages=conversations(), data=st.data())
def test_a_proper_part_is_refused_or_ends_at_a_message(
    full: Tokenizer, messages: tuple[Message, ...], data: st.DataObject
) -> None:
    rendered = FastRenderer(full).render(messages)
    tokens = rendered.tokens()
    stop = data.draw(st.integers(1, len(tokens) - 1))
    borders = {sum(len(piece) for piece in rendered.messages[:count]) for count in range(len(messages))}
    if stop in borders:
        assert Parser(full).messages(tokens[:stop]) == messages[: sorted(borders).index(stop)]
    else:
        with pytest.raises(HarmonyError, match="token"):
            Parser(full).parse(tokens[:stop])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2 + 2?", "no_start"),
        ("<|start|>wizard<|message|>x<|end|>", "unknown_role"),
        ("<|start|> user<|message|>x<|end|>", "unknown_role"),
        ("<|start|>assistant<|message|>x<|end|>", "no_channel"),
        ("<|start|>assistant<|channel|>commentary<|message|>x<|end|>", "unknown_channel"),
        ("<|start|>user<|channel|>final<|message|>x<|end|>", "unknown_channel"),
        ("<|start|>user<|end|>", "no_message"),
        ("<|start|>user<|message|>x<|start|>", "special_in_content"),
        ("<|start|>user<|message|>x<|end|>y", "no_start"),
        ("<|start|>user<|message|>x", "unclosed"),
        (VALID.replace("<|return|>", "<|end|>"), "wrong_terminator"),
        (VALID + VALID, "wrong_terminator"),
        (VALID.replace("2 + 2?<|end|>", "2 + 2?<|return|>"), "wrong_terminator"),
    ],
)
def test_what_no_renderer_writes_is_refused(tokenizer: Tokenizer, text: str, reason: str) -> None:
    with pytest.raises(HarmonyError) as caught:
        Parser(tokenizer).parse(ids_of(tokenizer, text))
    assert caught.value.reason == reason


def test_content_that_is_not_utf8_is_refused(full: Tokenizer) -> None:
    half = full.encode_ordinary("\U0001f9ff").tolist()[:1]
    ids = ids_of(full, "<|start|>user<|message|>") + half + ids_of(full, "<|end|>")
    with pytest.raises(HarmonyError) as caught:
        Parser(full).parse(ids)
    assert caught.value.reason == "invalid_utf8"


PROMPTED = ANALYSIS.removeprefix("<|start|>assistant")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (PROMPTED + FINAL, None),
        (FINAL.removeprefix("<|start|>assistant"), "no_analysis"),
        (FINAL.removeprefix("<|start|>assistant").replace("4", " "), "wrong_order"),
        (PROMPTED, "wrong_order"),
        (PROMPTED + ANALYSIS + FINAL, "wrong_order"),
        (PROMPTED + FINAL.replace("<|return|>", "<|end|>"), "wrong_terminator"),
        (PROMPTED.replace("<|end|>", "<|return|>"), "wrong_order"),
        (PROMPTED + FINAL + "more", "text_after_return"),
        (PROMPTED + FINAL.removesuffix("<|return|>"), "unclosed"),
        (PROMPTED.replace("2+2=4", " \n") + FINAL, "empty_analysis"),
        (PROMPTED + FINAL.replace("4", ""), "empty_final"),
        (PROMPTED + FINAL + "<|endoftext|>", "text_after_return"),
        ("", "unclosed"),
        ("hello", "unclosed"),
        ("<|endoftext|>", "no_message"),
    ],
)
def test_judging_completions(tokenizer: Tokenizer, completion: str, reason: str | None) -> None:
    judged = Parser(tokenizer).judge_completion(ids_of(tokenizer, completion))
    assert (judged.valid, judged.reason) == (reason is None, reason)
    if judged.valid:
        assert (judged.analysis, judged.final) == ("2+2=4", "4")


@SHARED
@given(messages=conversations())
def test_the_completion_of_any_training_conversation_is_valid(full: Tokenizer, messages: tuple[Message, ...]) -> None:
    renderer = FastRenderer(full)
    prompt, whole = renderer.generation_prompt(messages[:-2]), renderer.render(messages).tokens()
    judged = Parser(full).judge_completion(whole[len(prompt) :].tolist())
    assert judged.valid and (judged.analysis, judged.final) == (messages[-2].content, messages[-1].content)


def test_a_vocabulary_without_harmonys_tokens_is_named_and_how_to_get_one(tmp_path: Path) -> None:
    plain = HFDirectory(write_vocabulary(tmp_path, special_tokens="qwen"))
    for use in (FastRenderer, Parser, completion_automaton):
        with pytest.raises(TokenizerError, match=r"no Harmony tokens \(<\|start\|>.* plain text only") as refused:
            use(plain)
        assert "vpmoe tokenizer train --special-tokens harmony" in str(refused.value.remedy)


@SHARED
@given(messages=conversations())
def test_the_automaton_of_a_learned_vocabulary_takes_what_is_rendered(
    learned: Tokenizer, messages: tuple[Message, ...]
) -> None:
    following, accepting = completion_automaton(learned)
    renderer = FastRenderer(learned)
    prompt, state = renderer.generation_prompt(messages[:-2]), 0
    for token in renderer.render(messages).tokens()[len(prompt) :]:
        assert state not in accepting
        state = int(following[state, token])
    assert state in accepting


EDITS = st.lists(
    st.tuples(st.integers(0, 99), st.sampled_from(["drop", "repeat", "swap", "cut", "special"])), max_size=2
)


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["compact", "learned"])
@SHARED
@given(messages=conversations(), edits=EDITS, special=st.integers(0, 20))
def test_the_trainers_reading_of_an_answer_agrees(
    vocabulary: str,
    request: pytest.FixtureRequest,
    messages: tuple[Message, ...],
    edits: list[tuple[int, str]],
    special: int,
) -> None:
    """Whether it is valid, and whose span a token is; wherever the prompt ends, and whatever became of the answer."""
    compact: Tokenizer = request.getfixturevalue(vocabulary)
    form, renderer = Form(TokenPieces(compact.pieces()), compact.special_tokens), FastRenderer(compact)
    parser, rendered = Parser(compact), renderer.render(messages)
    prompt, ids = renderer.generation_prompt(messages[:-2]).tolist(), rendered.tokens().tolist()
    ids = ids[len(prompt) :]
    for place, what in edits:
        at = place % max(len(ids), 1)
        one = ids[at : at + 1]
        changed = {
            "drop": [],
            "repeat": one * 2,
            "swap": ids[at + 1 : at + 2] + one,
            "special": [compact.first_special_id + special],
        }
        ids = ids[:at] if what == "cut" else ids[:at] + changed[what] + ids[at + 1 + (what == "swap") :]
    judged, opening = parser.judge_completion(ids), parser.opening
    seen = form(prompt, ids)
    behind_user = form(prompt[: -len(opening)], [*opening, *ids])
    assert seen.valid == behind_user.valid == judged.valid
    assert behind_user.span_id[len(opening) :].tolist() == seen.span_id.tolist() and len(seen.span_id) == len(ids)
    if judged.valid:
        parsed = parser.parse([*opening, *ids])
        assert behind_user.span_id.tolist() == spans_of(parsed, len(opening) + len(ids)).tolist()
