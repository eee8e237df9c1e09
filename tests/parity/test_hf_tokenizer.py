"""An export's tokenizer against ours: same ids for any text, and the chat template against the renderer."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from vpmoe.data_curation.conversations.synth import resolve_synth, to_conversation
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.prompts import REASONING_EFFORTS, Prompts
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.hf import tokenization_vpmoe, tokenizer_files
from vpmoe.tokenizer import CompactVocabulary, Tokenizer
from vpmoe.tokenizer.o200k_harmony import ALL_SPECIAL_TOKENS, NAMED_SPECIAL_TOKENS, VOCAB_SIZE, load_o200k_harmony

SAMPLE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "synth_sample"
CORPUS = "What is 37 + 45? The larger of the two numbers; analysis, final, assistant, user, system. of of the the"
ANY = st.text(st.characters(exclude_categories=["Cs"]))
BLANKS = [" ", "   ", "\n\n", "\r\n", "\t", "\xa0", "\u3000", "\x1c"]
WORDS = ["'s", "'LL", "'ſ", "é", "e\u0301", "漢", "😀", "1234", "९", "the", " The", "ǅ", "aaaa", "abab", "../", "İ"]
PARTS = st.sampled_from([*sorted(NAMED_SPECIAL_TOKENS), "<|", "|>", "<|end", *BLANKS, *WORDS])
TEXTS = ANY | st.lists(PARTS, max_size=12).map("".join)
PLAIN = TEXTS.filter(lambda text: not any(special in text for special in (*NAMED_SPECIAL_TOKENS, "<|reserved_")))
LINES = st.none() | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20).filter(lambda t: "<|" not in t)


def directory(folder: Path, vocabulary: Tokenizer) -> Path:
    """What an export holds of a tokenizer."""
    told = {key: getattr(vocabulary, key) for key in ("name", "rank_file_sha256", "vocab_size", "padded_vocab_size")}
    told["compact_map"] = None
    if isinstance(vocabulary, CompactVocabulary):
        told["compact_map"] = {"path": "compact_vocab.npy", "sha256": vocabulary.save(folder / "compact_vocab.npy")}
    (folder / "vocabulary.json").write_text(json.dumps(told))
    files, _ = tokenizer_files.made_from(folder.iterdir())
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return folder


def loaded(vocabulary: Tokenizer, folder: Path) -> tuple[Tokenizer, Any]:
    """A vocabulary, and what ``AutoTokenizer`` makes of its export."""
    directory(folder, vocabulary)
    return vocabulary, AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    counts = np.bincount(load_o200k_harmony().encode_ordinary(CORPUS), minlength=VOCAB_SIZE)
    vocabulary = CompactVocabulary.from_counts(load_o200k_harmony(), counts, max_size=280)
    return loaded(vocabulary, tmp_path_factory.mktemp("compact"))


@pytest.fixture(scope="module", params=["o200k_harmony", "o200k_harmony_compact"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    if request.param == "o200k_harmony_compact":
        return request.getfixturevalue("compact")
    return loaded(load_o200k_harmony(), tmp_path_factory.mktemp(request.param))


def ordinary(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@given(text=TEXTS)
@settings(max_examples=500)
def test_same_ids_and_the_way_back(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    ids = ours.encode_ordinary(text).tolist()
    assert ordinary(theirs, text) == ids
    assert theirs.decode(ids) == text


def test_same_ids_on_runs_of_the_same_characters(both: tuple[Tokenizer, Any]) -> None:
    """Where a merge fits in several overlapping places."""
    ours, theirs = both
    draw = random.Random(1)
    units = [chr(c) for c in range(1, 0x180)] + ["".join(draw.choices("ab =-_*\n.0é漢", k=2)) for _ in range(100)]
    for unit in units:
        for count in (2, 3, 5, 7, 8, 9, 17, 33):
            assert ordinary(theirs, unit * count) == ours.encode_ordinary(unit * count).tolist(), (unit, count)


def merged_step_by_step(data: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The definition: look at every pair, join the lowest rank's leftmost one, and again."""
    parts = [data] if data in ranks else [bytes([byte]) for byte in data]
    while True:
        joined = [ranks.get(left + right, math.inf) for left, right in itertools.pairwise(parts)]
        best = min(joined, default=math.inf)
        if best == math.inf:
            return parts
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@st.composite
def rank_tables(draw: st.DrawFn) -> dict[bytes, int]:
    """Tokens over two or three letters, of which few or many are made of two others; in any order of ranks."""
    letters = [bytes([letter]) for letter in b"abc"[: draw(st.integers(2, 3))]]
    pieces = list(letters)
    for _ in range(draw(st.integers(0, 14))):
        pieces.append(draw(st.sampled_from(pieces)) + draw(st.sampled_from(pieces)))
    pieces = list(dict.fromkeys(pieces))
    order = draw(st.permutations(range(len(pieces)))) if draw(st.booleans()) else range(len(pieces))
    return dict(zip(pieces, order, strict=True))


@given(ranks=rank_tables(), letters=st.lists(st.integers(0, 2), min_size=1, max_size=60))
@settings(max_examples=500)
def test_merging_is_by_rank_and_then_from_the_left(ranks: dict[bytes, int], letters: list[int]) -> None:
    data = bytes(b"abc"[letter] for letter in letters if bytes([b"abc"[letter]]) in ranks) or b"a"
    assert tokenization_vpmoe.merge(data, ranks) == merged_step_by_step(data, ranks)


@given(text=st.lists(ANY | PARTS, min_size=1, max_size=20).map("".join).filter(bool))
@settings(max_examples=200)
def test_real_ranks_merge_as_ever(compact: tuple[Tokenizer, Any], text: str) -> None:
    """Whole texts as one cut."""
    ranks = compact[1]._ranks
    assert tokenization_vpmoe.merge(text.encode(), ranks) == merged_step_by_step(text.encode(), ranks)


class CountedRanks(dict[bytes, int]):
    """Ranks that count how often they are asked."""

    asked = 0

    def get(self, *arguments: Any) -> Any:
        self.asked += 1
        return super().get(*arguments)


@pytest.mark.parametrize("kind", ["one letter", "random letters", "three bytes each"])
def test_a_cut_of_many_characters_takes_steps_in_proportion(compact: tuple[Tokenizer, Any], kind: str) -> None:
    """Every pair that is looked up is one that was there at the start, or one of two that a join makes."""
    theirs = compact[1]
    draw = random.Random(1)
    ranks, theirs._ranks = theirs._ranks, CountedRanks(theirs._ranks)
    try:
        for count in (1000, 8000):
            alphabet = {"one letter": "a", "random letters": "abcdefghijklmnop", "three bytes each": "漢字"}[kind]
            text = "".join(draw.choices(alphabet, k=count))
            theirs._ranks.asked = 0
            tokens = theirs._merge_uncached(text)
            assert 0 < len(tokens) <= len(text.encode())
            assert theirs._ranks.asked <= 3 * len(text.encode())
    finally:
        theirs._ranks = ranks


def test_special_tokens_have_their_ids(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    known = ALL_SPECIAL_TOKENS if ours.vocab_size == VOCAB_SIZE else ours.special_tokens
    assert {token: theirs.convert_tokens_to_ids(token) for token in known} == known
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == ("<|return|>", "<|endoftext|>", "<|startoftext|>")
    assert len(theirs) == ours.vocab_size
    ids = theirs("a<|end|>b", add_special_tokens=False)["input_ids"]
    assert ids == [*ours.encode_ordinary("a"), ours.special_id("<|end|>"), *ours.encode_ordinary("b")]
    assert theirs.decode(ids, skip_special_tokens=True) == "ab"
    assert theirs("a")["input_ids"] == ours.encode_ordinary("a").tolist()  # nothing put in front
    padded = theirs(["a", "b c d"], padding=True)
    assert padded["input_ids"][0][0] == ours.eod_id and padded["attention_mask"][0][0] == 0


def test_saved_again_it_is_the_same(compact: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    """Of the class that travels with an export; the full vocabulary has transformers' own."""
    _, theirs = compact
    theirs.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True, local_files_only=True)
    text = "<|start|>user<|message|>What is 37 + 45? naïve 漢字<|end|>"
    assert again(text)["input_ids"] == theirs(text)["input_ids"]


def as_dicts(messages: tuple[Message, ...] | list[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content, **({"channel": m.channel} if m.channel else {})} for m in messages]


def rendered(
    tokenizer: Any, messages: list[dict[str, str]], taught: dict[str, str | None] | None = None, **settings: Any
) -> list[int]:
    from vpmoe.hf.chat_template import chat_template

    tokenizer.chat_template = chat_template(taught)
    return tokenizer.apply_chat_template(messages, **settings)["input_ids"]


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    head = [Message(role, draw(PLAIN)) for role in ("system", "developer") if draw(st.booleans())]
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Message("user", draw(PLAIN)), Message("assistant", draw(PLAIN), "analysis")]
        turns += [Message("assistant", draw(PLAIN), "final")]
    return [*head, *turns[: draw(st.integers(1, len(turns)))]]


@given(messages=conversations())
@settings(max_examples=150)
def test_the_template_renders_what_the_renderer_does(both: tuple[Tokenizer, Any], messages: list[Message]) -> None:
    ours, theirs = both
    renderer = FastRenderer(ours)
    told = as_dicts(messages)
    asked = [at for at, message in enumerate(messages) if message.role == "user"]
    messages = [one for at, one in enumerate(messages) if one.channel != "analysis" or at > asked[-1]]
    assert rendered(theirs, told, default_prompts=False) == renderer.render(messages).tokens().tolist()
    if messages[0].role != "user":
        assert rendered(theirs, told) == rendered(theirs, told, default_prompts=False)
    if messages[-1].role == "user":
        expected = renderer.generation_prompt(messages).tolist()
        assert rendered(theirs, told, default_prompts=False, add_generation_prompt=True) == expected


@given(
    prompts=st.builds(
        Prompts, LINES, LINES, LINES, st.sampled_from(REASONING_EFFORTS), st.sampled_from([("final",), ()]), LINES
    ),
    analysis=PLAIN.filter(bool),
)
@settings(max_examples=100)
def test_prompts_are_set_by_name(both: tuple[Tokenizer, Any], prompts: Prompts, analysis: str) -> None:
    ours, theirs = both
    settings_ = {name: getattr(prompts, name) for name in Prompts.__dataclass_fields__}
    question, answer = Message("user", "37 + 45?"), Message("assistant", "82", "final")
    thought = Message("assistant", analysis, "analysis")
    expected = FastRenderer(ours).render([*prompts.messages(), question, thought, answer]).tokens().tolist()
    told = [*as_dicts([question]), {"role": "assistant", "thinking": analysis, "content": "82"}]
    assert rendered(theirs, told, **settings_) == expected


def test_what_a_bare_question_becomes(both: tuple[Tokenizer, Any]) -> None:
    """The prompts that training conversations have."""
    ours, theirs = both
    question = Message("user", "37 + 45?")
    expected = FastRenderer(ours).generation_prompt([*Prompts().messages(), question]).tolist()
    assert rendered(theirs, as_dicts([question]), add_generation_prompt=True) == expected


@given(system=PLAIN.filter(bool), developer=st.one_of(st.none(), PLAIN))
@settings(max_examples=60)
def test_a_model_taught_under_other_texts_begins_with_those(
    both: tuple[Tokenizer, Any], system: str, developer: str | None
) -> None:
    ours, theirs = both
    question, taught = Message("user", "37 + 45?"), {"system": system, "developer": developer}
    head = [Message("system", system), *([Message("developer", developer)] if developer else [])]
    expected = FastRenderer(ours).generation_prompt([*head, question]).tolist()
    assert rendered(theirs, as_dicts([question]), taught, add_generation_prompt=True) == expected
    asked = rendered(theirs, as_dicts([question]), taught, reasoning_effort="high")
    assert asked == rendered(theirs, as_dicts([question]), reasoning_effort="high")
    own = as_dicts([*head, question])
    assert rendered(theirs, own, {"system": "another", "developer": None}, add_generation_prompt=True) == expected


QUESTION = {"role": "user", "content": "?"}
REFUSED = {
    "no text": [{"role": "user", "content": [{"type": "text", "text": "?"}]}],
    "spells the special token <|end|>": [{"role": "user", "content": "a<|end|>b"}],
    "spells the special token <|reserved_": [{"role": "user", "content": "<|reserved_200013|>"}],
    "role tool is none of": [QUESTION, {"role": "tool", "content": "4"}],
    "tool_calls": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}],
    "channel commentary is none of": [QUESTION, {"role": "assistant", "channel": "commentary", "content": "x"}],
    "thinking beside": [QUESTION, {"role": "assistant", "channel": "analysis", "thinking": "x", "content": "x"}],
    "has no channel": [{"role": "user", "channel": "final", "content": "x"}],
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_format_has_no_place_for_is_refused(both: tuple[Tokenizer, Any], what: str) -> None:
    with pytest.raises(TemplateError, match=what.replace("|", r"\|")):
        rendered(both[1], REFUSED[what])


def test_settings_that_would_do_nothing_are_refused(both: tuple[Tokenizer, Any]) -> None:
    _, theirs = both
    with pytest.raises(TemplateError, match="tools"):
        rendered(theirs, [QUESTION], tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    with pytest.raises(TemplateError, match="reasoning_effort is extreme"):
        rendered(theirs, [QUESTION], reasoning_effort="extreme")
    with pytest.raises(TemplateError, match="its own system"):
        rendered(theirs, [{"role": "system", "content": "s"}, QUESTION], reasoning_effort="high")
    with pytest.raises(TemplateError, match="ends with the user's"):
        rendered(theirs, [QUESTION, {"role": "assistant", "content": "82"}], add_generation_prompt=True)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no real rows at {SAMPLE}")
def test_real_rows(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    renderer = FastRenderer(ours)
    compared = 0
    for _, row in resolve_synth(str(SAMPLE)).rows():
        messages = to_conversation(row, Prompts()).messages
        told = as_dicts([m for m in messages if m.role not in ("system", "developer")])
        if any(special in m.content for m in messages for special in NAMED_SPECIAL_TOKENS):
            continue
        assert rendered(theirs, told) == renderer.render(messages).tokens().tolist()
        compared += 1
        if compared == 200:
            break
    assert compared >= 100
