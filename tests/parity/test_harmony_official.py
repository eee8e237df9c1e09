"""Our renderer against openai_harmony, id for id: hostile text, every form of the system message, 700 real rows."""

from pathlib import Path

import numpy as np
import openai_harmony as official
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vpmoe.data_curation.conversations.synth import resolve_synth, to_conversation
from vpmoe.errors import TokenizerError
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.official import OfficialRenderer, load_encoding
from vpmoe.harmony.parse import Parser
from vpmoe.harmony.prompts import Prompts
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.harmony.spans import documents
from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.o200k_harmony import ALL_SPECIAL_TOKENS, VOCAB_SIZE, load_o200k_harmony

NO_DROP = official.RenderConversationConfig(auto_drop_analysis=False)
SAMPLE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "synth_sample"
PARTS = st.sampled_from(
    [*sorted(ALL_SPECIAL_TOKENS)[:12], "<|", "|>", " ", "\n\n", "\r\n", "'s", "é", "漢", "😀", "1234", "\t"]
)
WRITING = [
    "\0",
    "\u202e",
    "مرحبا",
    "שלום",
    "👩\u200d👩\u200d👧",
    "🏳️\u200d🌈",
    "🇫🇷",
    "e\u0301",
    "\u200d",
    "\ufeff",
    "Б",
    "९",
    "１２３４",
]
BLANKS = [" ", "   ", "\t\t", "\xa0", "\u3000 ", "\r\n", "\n\n  ", "\x1c", "\x85"]
HOSTILE = st.sampled_from([*sorted(ALL_SPECIAL_TOKENS)[:4], *WRITING, *BLANKS, "a", "'LL", "../"])
# Ten lines of 10,000 characters: over a stretch without a break the official tokenizer takes time as its square.
LINE = st.lists(HOSTILE, min_size=1, max_size=6).map(lambda pieces: ("".join(pieces) * 10_000)[:10_000])
LONG = st.lists(LINE, min_size=10, max_size=10).map("\n".join)
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(PARTS, max_size=12).map("".join)
LINES = st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def fast() -> FastRenderer:
    return FastRenderer(load_o200k_harmony())


def training_ids(messages: list[official.Message]) -> list[int]:
    conversation = official.Conversation.from_messages(messages)
    return load_encoding().render_conversation_for_training(conversation, NO_DROP)


def turn(user: str, analysis: str, final: str) -> list[official.Message]:
    say = official.Message.from_role_and_content
    return [
        say(official.Role.USER, user),
        say(official.Role.ASSISTANT, analysis).with_channel("analysis"),
        say(official.Role.ASSISTANT, final).with_channel("final"),
    ]


def own_turn(user: str, analysis: str, final: str) -> list[Message]:
    return [Message("user", user), Message("assistant", analysis, "analysis"), Message("assistant", final, "final")]


def test_special_tokens_are_the_same() -> None:
    encoding = load_encoding()
    for spelling, token_id in ALL_SPECIAL_TOKENS.items():
        assert encoding.encode(spelling, allowed_special="all") == [token_id]
    # Their one further reserved id lies outside the vocabulary of 201,088 rows.
    assert encoding.special_tokens_set - set(ALL_SPECIAL_TOKENS) == {f"<|reserved_{VOCAB_SIZE}|>"}


@settings(max_examples=200)
@given(user=TEXTS, analysis=TEXTS, final=TEXTS, turns=st.integers(1, 2))
def test_hostile_text_renders_the_same(fast: FastRenderer, user: str, analysis: str, final: str, turns: int) -> None:
    ours = fast.render(own_turn(user, analysis, final) * turns).tokens()
    assert ours.tolist() == training_ids(turn(user, analysis, final) * turns)


@settings(max_examples=400)
@given(texts=st.tuples(*[st.lists(HOSTILE, max_size=14).map("".join)] * 3))
def test_directions_emoji_blanks_and_line_ends_render_the_same(fast: FastRenderer, texts: tuple[str, str, str]) -> None:
    ours = fast.render(own_turn(*texts))
    assert ours.tokens().tolist() == training_ids(turn(*texts))
    assert Parser(fast.tokenizer).messages(ours.tokens()) == tuple(own_turn(*texts))


@settings(max_examples=4)
@given(text=LONG)
@example(text="a" * 100_000)
def test_fields_of_100_000_characters_render_the_same(fast: FastRenderer, text: str) -> None:
    ours = fast.render(own_turn("q", text, "f"))
    assert ours.tokens().tolist() == training_ids(turn("q", text, "f"))
    assert Parser(fast.tokenizer).messages(ours.tokens()) == tuple(own_turn("q", text, "f"))


def test_a_lone_surrogate_is_refused_where_the_official_renderer_replaces_it_or_fails(fast: FastRenderer) -> None:
    with pytest.raises(TokenizerError, match="no UTF-8 form"):
        fast.render(own_turn("a\ud800b", "a", "f"))


@settings(max_examples=100)
@given(
    identity=LINES,
    cutoff=LINES,
    date=LINES,
    effort=st.sampled_from(["low", "medium", "high"]),
    channels=st.lists(st.sampled_from(["analysis", "commentary", "final"]), unique=True),
    instructions=LINES,
)
def test_system_and_developer_messages_are_the_same(
    fast: FastRenderer,
    identity: str | None,
    cutoff: str | None,
    date: str | None,
    effort: str,
    channels: list[str],
    instructions: str | None,
) -> None:
    prompts = Prompts(identity, cutoff, date, effort, tuple(channels), instructions)
    system = official.SystemContent(
        model_identity=identity,
        knowledge_cutoff=cutoff,
        conversation_start_date=date,
        reasoning_effort=official.ReasoningEffort(effort.capitalize()),
        channel_config=official.ChannelConfig.require_channels(channels),
    )
    theirs = [official.Message.from_role_and_content(official.Role.SYSTEM, system)]
    if instructions:
        content = official.DeveloperContent(instructions=instructions)
        theirs.append(official.Message.from_role_and_content(official.Role.DEVELOPER, content))
    ours = fast.render([*prompts.messages(), *own_turn("q", "a", "f")]).tokens()
    assert ours.tolist() == training_ids([*theirs, *turn("q", "a", "f")])


@settings(max_examples=50)
@given(user=TEXTS)
def test_generation_prompts_are_the_same(fast: FastRenderer, user: str) -> None:
    messages = [*Prompts().messages(), Message("user", user)]
    theirs = OfficialRenderer(fast.tokenizer).generation_prompt(messages)
    assert fast.generation_prompt(messages).tolist() == theirs.tolist()


@settings(max_examples=50)
@given(user=TEXTS, analysis=TEXTS, final=TEXTS)
def test_official_renderer_gives_the_same_pieces(fast: FastRenderer, user: str, analysis: str, final: str) -> None:
    messages = [*Prompts().messages(), *own_turn(user, analysis, final)]
    for ours, theirs in zip(
        fast.render(messages).messages, OfficialRenderer(fast.tokenizer).render(messages).messages, strict=True
    ):
        for part in ("header", "content", "terminator"):
            assert np.array_equal(getattr(ours, part), getattr(theirs, part))


def test_official_parser_reads_our_completions_as_we_do(fast: FastRenderer) -> None:
    messages = [*Prompts().messages(), *own_turn("2 + 2?", "<|end|> 2+2=4", "4")]
    completion = fast.render(messages).tokens()[len(fast.generation_prompt(messages[:-2])) :].tolist()
    theirs = load_encoding().parse_messages_from_completion_tokens(completion, official.Role.ASSISTANT)
    judged = Parser(fast.tokenizer).judge_completion(completion)
    texts = [content.text for message in theirs for content in message.content]  # pyright: ignore
    assert judged.valid and [judged.analysis, judged.final] == texts


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"real rows are not at {SAMPLE}: they are not part of the repository")
def test_real_rows_render_parse_and_label_the_same(fast: FastRenderer) -> None:
    parser, prompts = Parser(fast.tokenizer), Prompts()
    used = np.zeros(VOCAB_SIZE, dtype=np.int64)
    conversations = [to_conversation(row, prompts) for _, row in resolve_synth(str(SAMPLE)).rows()]
    assert len(conversations) == 700
    official_renderer = OfficialRenderer(fast.tokenizer)
    for conversation in conversations:
        ours = fast.render(conversation.messages)
        tokens, span, _ = documents((ours,), fast.tokenizer.eod_id)
        assert np.array_equal(tokens[:-1], official_renderer.render(conversation.messages).tokens())
        assert parser.messages(tokens[:-1]) == conversation.messages
        supervised = len(ours.messages[-2]) + len(ours.messages[-1])
        assert int((span > 0).sum()) == supervised and not span[: len(ours) - supervised].any()
        used += np.bincount(tokens, minlength=VOCAB_SIZE)
    compact = CompactVocabulary.from_counts(load_o200k_harmony(), used, max_size=4096)
    renderer, compact_parser = FastRenderer(compact), Parser(compact)
    for conversation in conversations[::20]:
        assert compact_parser.messages(renderer.render(conversation.messages).tokens()) == conversation.messages
