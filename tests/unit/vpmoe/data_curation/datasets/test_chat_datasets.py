"""Chat rows as token files: messages come back by parsing, masks are the distillation data's, pairs stay pairs."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import openai_harmony
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vpmoe.files import file_entry
from megatron_vpmoe.token_files import read_triple
from vpmoe.cli import main
from vpmoe.data_curation.checks.verify import verify
from vpmoe.data_curation.datasets.chat import ChatDataset, ChatEncoder
from vpmoe.data_curation.datasets.encode import Documents, Encoded
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.datasets.sequential import Pass, build_sequential
from vpmoe.data_curation.datasets.text import HealingText
from vpmoe.data_curation.manifest import read_manifest, write_manifest
from vpmoe.data_curation.rows.source import resolve
from vpmoe.errors import DataError
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.official import as_official, load_encoding
from vpmoe.harmony.parse import Parser
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.harmony.spans import aligned_to_labels, documents, loss_mask
from vpmoe.harmony.truncation import make_fit
from vpmoe.tokenizer.o200k_harmony import load_o200k_harmony

FULL = load_o200k_harmony()
LONG = BuildOptions(seq_len=1 << 16, valid_fraction=0)
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40),
    st.lists(st.sampled_from(["<|end|>", "<|start|>assistant", "<|return|>", "é", "漢字", "😀", "\r\n", "x "])).map(
        "".join
    ),
).filter(lambda text: bool(text) and not text.isspace())


def as_row(messages: tuple[Message, ...]) -> dict:
    entries = [
        {"role": m.role, "content": m.content, **({"channel": m.channel} if m.channel else {})} for m in messages
    ]
    return {"messages": entries}


@st.composite
def chats(draw: st.DrawFn, analysis: bool | None = None, turns: int = 3) -> tuple[Message, ...]:
    messages = [Message(role, draw(TEXTS)) for role in ("system", "developer") if draw(st.booleans())]
    for _ in range(draw(st.integers(1, turns))):
        messages.append(Message("user", draw(TEXTS)))
        if draw(st.booleans()) if analysis is None else analysis:
            messages.append(Message("assistant", draw(TEXTS), "analysis"))
        messages.append(Message("assistant", draw(TEXTS), "final"))
    return tuple(messages)


def encoded(kind: ChatDataset, row: dict) -> list[Documents]:
    return each(ChatEncoder(kind, FULL).encode(row))


def each(encoded: Encoded) -> list[Documents]:
    """The documents of a row one by one; none where it was left out."""
    if encoded.documents is None:
        return []
    bounds = np.append(0, np.cumsum(encoded.documents.lengths)).tolist()
    return [
        Documents(*(signal[begin:end] for signal in encoded.documents[:3]), np.array([end - begin]))
        for begin, end in pairwise(bounds)
    ]


def in_a_chat(messages: tuple[Message, ...], turn: int) -> tuple[Message, ...]:
    """The messages up to the end of a turn, as they stand when it is answered: earlier analysis is gone."""
    users = [at for at, message in enumerate(messages) if message.role == "user"] + [len(messages)]
    earlier = tuple(message for message in messages[: users[turn]] if message.channel != "analysis")
    return earlier + messages[users[turn] : users[turn + 1]]


@given(chats())
@settings(max_examples=40)
def test_each_turn_is_learnt_once_in_the_context_that_a_chat_gives_it(messages: tuple[Message, ...]) -> None:
    learnt = 0
    for stored in encoded(ChatDataset(LONG), as_row(messages)):
        assert stored.tokens[-1] == FULL.eod_id and np.array_equal(stored.lossmask, stored.span > 0)
        described = np.append(0, stored.span[:-1])  # of the token itself
        parsed = Parser(FULL).parse(stored.tokens[:-1])
        users = [at for at, item in enumerate(parsed) if item.message.role == "user"]
        assert tuple(item.message for item in parsed) == in_a_chat(messages, len(users) - 1)
        for turn, at in enumerate(users):
            end = users[turn + 1] if turn + 1 < len(users) else len(parsed)
            asked = FastRenderer(FULL).generation_prompt(in_a_chat(messages, turn)[: at + 1])
            answer = described[parsed[at].stop : parsed[end - 1].stop]
            if answer.any():
                assert turn == learnt and np.array_equal(stored.tokens[: len(asked)], asked)
                learnt += 1
                spans = [{"analysis": 1, "final": 2}[item.message.channel or ""] for item in parsed[at + 1 : end]]
                lengths = [item.stop - item.start for item in parsed[at + 1 : end]]
                assert np.array_equal(answer, np.repeat(spans, lengths))
        assert learnt == len(users)
    assert learnt == sum(message.role == "user" for message in messages)


@pytest.mark.parametrize("thoughts", [(), (Message("assistant", "so", "analysis"),)])
def test_conversations_that_begin_alike_are_in_one_split(thoughts: tuple[Message, ...]) -> None:
    """Also where each is as far as the one before and a turn more."""
    encoder, splits = ChatEncoder(ChatDataset(BuildOptions(valid_fraction=0.5)), FULL), set()
    for number in range(20):
        begun = (Message("user", f"{number}"), *thoughts, Message("assistant", "a", "final"))
        rows = [as_row(begun), *(as_row((*begun, Message("user", more), *begun[1:])) for more in "xyz")]
        (split,) = {encoder.encode(row).split for row in rows}
        splits.add(split)
    assert splits == {"train", "valid"}


def test_two_turns_are_read_as_openai_harmony_renders_them() -> None:
    """Of three it drops, as installed, only the first one's analysis; the rule it documents is of all earlier ones."""
    dropping = openai_harmony.RenderConversationConfig(auto_drop_analysis=True)
    turns = [
        (Message("user", f"q{n}"), Message("assistant", f"t{n}", "analysis"), Message("assistant", f"a{n}", "final"))
        for n in range(2)
    ]
    _, stored = encoded(ChatDataset(LONG), as_row(turns[0] + turns[1]))
    official = load_encoding().render_conversation_for_training(as_official(turns[0] + turns[1]), dropping)
    assert stored.tokens[:-1].tolist() == official
    asked = as_official(turns[0] + turns[1][:1]), openai_harmony.Role.ASSISTANT, dropping
    prompt = load_encoding().render_conversation_for_completion(*asked)
    assert official[: len(prompt)] == prompt and not stored.lossmask[: len(prompt) - 3].any()


@given(chats(analysis=True, turns=1), st.integers(40, 200))
@settings(max_examples=80)
def test_a_conversation_of_one_turn_is_what_the_distillation_data_has(
    messages: tuple[Message, ...], seq_len: int
) -> None:
    found = encoded(ChatDataset(BuildOptions(seq_len=seq_len, valid_fraction=0)), as_row(messages))
    fitted = make_fit(FULL, seq_len)(FastRenderer(FULL).render(messages)).conversation
    assert (not found) == (fitted is None)
    if fitted is None:
        return
    tokens, span, _ = documents((fitted,), FULL.eod_id)
    aligned = aligned_to_labels(span, np.array([len(span)]))
    assert np.array_equal(found[0].tokens, tokens)
    assert np.array_equal(found[0].span, aligned)
    assert np.array_equal(found[0].lossmask, loss_mask(aligned))


@given(chats(), st.integers(24, 120))
@settings(max_examples=80)
def test_what_is_cut_still_parses_and_keeps_the_last_final(messages: tuple[Message, ...], seq_len: int) -> None:
    encoder = ChatEncoder(ChatDataset(BuildOptions(seq_len=seq_len, valid_fraction=0)), FULL)
    encoded = encoder.encode(as_row(messages))
    if encoded.documents is None:
        assert {"dropped_final_too_long", "dropped_context_too_long"} & encoded.truncation.keys()
        return
    assert all(len(stored.tokens) <= seq_len for stored in each(encoded))
    kept = Parser(FULL).messages(each(encoded)[-1].tokens[:-1])
    if kept[-1] != messages[-1]:
        assert {"dropped_final_too_long", "dropped_context_too_long"} & encoded.truncation.keys()
        return
    messages = in_a_chat(messages, sum(message.role == "user" for message in messages) - 1)
    assert all(message.content.strip() for message in kept), "an emptied analysis or question is no example"
    head = tuple(message for message in messages if message.role in ("system", "developer"))
    assert kept[: len(head)] == head
    if not {"analysis_cut", "user_cut"} & encoded.truncation.keys():  # beyond whole turns nothing was cut
        assert kept[len(head) :] == messages[len(messages) - len(kept) + len(head) :]


@given(chats())
@settings(max_examples=40)
def test_only_the_last_turn_may_be_supervised(messages: tuple[Message, ...]) -> None:
    every = encoded(ChatDataset(LONG), as_row(messages))[-1]
    (last,) = encoded(ChatDataset(LONG, supervise="last"), as_row(messages))
    assert np.array_equal(every.tokens, last.tokens)
    user = [item for item in Parser(FULL).parse(every.tokens[:-1]) if item.message.role == "user"][-1]
    assert not last.span[: user.stop - 1].any() and not last.lossmask[: user.stop - 1].any()
    assert np.array_equal(last.span[user.stop - 1 :], every.span[user.stop - 1 :])


@given(chats(), TEXTS, TEXTS)
@settings(max_examples=60)
def test_pairs_share_their_prompt_and_supervise_their_completions(
    context: tuple[Message, ...], chosen: str, rejected: str
) -> None:
    if chosen == rejected:
        return
    prompt = (*context, Message("user", "and now?"))
    row = {"prompt": as_row(prompt)["messages"], "chosen": chosen, "rejected": rejected}
    sides = encoded(ChatDataset(LONG, pairs=True), row)
    assert len(sides) == 2
    for stored, text in zip(sides, (chosen, rejected), strict=True):
        whole = (*prompt, Message("assistant", text, "final"))
        expected = in_a_chat(whole, sum(message.role == "user" for message in prompt) - 1)
        parsed = Parser(FULL).parse(stored.tokens[:-1])
        assert tuple(item.message for item in parsed) == expected
        supervised = np.flatnonzero(stored.lossmask) + 1
        assert supervised.tolist() == list(range(parsed[-1].start, parsed[-1].stop))


def test_a_pair_loses_the_same_turns_on_both_sides_or_goes_whole() -> None:
    turn = (Message("user", "first " * 20), Message("assistant", "one " * 20, "final"))
    prompt = (*turn, Message("user", "second"))
    row = {"prompt": as_row(prompt)["messages"], "chosen": "yes", "rejected": "no " * 10}
    encoder = ChatEncoder(ChatDataset(BuildOptions(seq_len=80, valid_fraction=0), pairs=True), FULL)
    encoded = encoder.encode(row)
    assert encoded.documents is not None and encoded.tokens <= 80
    for stored in each(encoded):
        assert next(m.content for m in Parser(FULL).messages(stored.tokens[:-1])) == "second"
    assert encoded.truncation["turns_dropped"] == 1
    dropped = encoder.encode({**row, "rejected": "no " * 80})
    assert dropped.documents is None and dropped.truncation == {"dropped_pair_too_long": 1}


def sft_rows(count: int) -> list[dict]:
    return [
        {
            "number": i,
            "score": 0.5,
            "messages": as_row(
                (Message("user", f"what {i}?"), Message("assistant", f"that {i}", "final")) * (1 + i % 3)
            )["messages"],
        }
        for i in range(count)
    ]


def preference_rows(count: int) -> list[dict]:
    return [{"prompt": f"what {i}?", "chosen": f"well, {i}", "rejected": "no " * (1 + i % 5)} for i in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sft_files_and_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", [*sft_rows(200), {"messages": []}])
    arguments = ["data", "build-chat", "--input", str(path), "--output-dir", str(tmp_path / "out"), "--quiet"]
    arguments += ["--valid-fraction", "0.1"]
    assert main(arguments) == 2 and "unknown_key:number 200" in capsys.readouterr().err
    arguments += ["--overwrite", "--ignore-fields", "score, number"]
    assert main(arguments) == 2 and "1 of 201 rows were rejected" in capsys.readouterr().err
    arguments[-1] = "score"
    arguments += ["--max-reject-fraction", "0.01", "--supervise", "last", "--id-field", "number"]
    assert main([*arguments, "--add-system", "--shard-tokens", "4000"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["kind"], manifest["pairs"], manifest["config"]["supervise"]) == ("harmony_sft", False, "last")
    assert manifest["documents"] == {"rows_read": 201, "conversations": 200}
    assert len(manifest["splits"]["train"]["shards"]) > 1 and manifest["splits"]["valid"]["rows"] > 5
    (reject,) = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert (reject["row"], reject["reason"]) == ("rows.jsonl:201", "role_order") and "messages" in reject["excerpt"]
    triple = read_triple(tmp_path / "out" / "train", "shard_00")
    first = Parser(FULL).messages(triple.tokens[triple.place(0)][:-1])
    assert first[0].role == "system" and first[0].content == manifest["config"]["system_text"]
    assert manifest["prompts"] == {"system": first[0].content, "developer": None}
    assert verify(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.parametrize("supervise", ["all", "last"])
def test_verify_knows_what_of_a_conversation_is_read_alone(tmp_path: Path, supervise: str) -> None:
    turn = (Message("user", "why?"), Message("assistant", "well", "analysis"), Message("assistant", "so", "final"))
    path = write(
        tmp_path / "rows.jsonl", [as_row((Message("user", f"{i}"), *turn[2:], *turn, *turn)) for i in range(9)]
    )
    folder = tmp_path / "out"
    arguments = ["data", "build-chat", "--input", str(path), "--output-dir", str(folder), "--quiet"]
    assert main([*arguments, "--supervise", supervise, "--valid-fraction", "0"]) == 0
    documents = json.loads((folder / "manifest.json").read_text())["documents"]
    assert documents.get("read_anew", 0) == (9 if supervise == "all" else 0) and verify(folder) == []

    path, triple = folder / "train" / "shard_00_tokens.bin", read_triple(folder / "train", "shard_00")
    final, analysis = (int(FULL.encode_ordinary(word)[0]) for word in ("final", "analysis"))
    tokens, last = np.array(triple.tokens), triple.place(triple.documents - 1)
    tokens[last.start + int(np.flatnonzero(tokens[last] == final)[0])] = analysis
    path.write_bytes(tokens.tobytes())
    manifest = read_manifest(folder)
    manifest["splits"]["train"]["shards"][0]["files"][path.name] = file_entry(path)
    write_manifest(folder, manifest)
    assert any("analysis of an earlier turn" in fault for fault in verify(folder))


def preference_dataset(folder: Path) -> Path:
    path = write(folder / "rows.jsonl", preference_rows(120))
    arguments = ["data", "build-pairs", "--input", str(path), "--output-dir", str(folder / "out"), "--quiet"]
    assert main([*arguments, "--seq-len", "96", "--shard-tokens", "2000", "--valid-fraction", "0.1"]) == 0
    return folder / "out"


def test_preference_files_hold_chosen_and_rejected_side_by_side(tmp_path: Path) -> None:
    folder = preference_dataset(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["kind"], manifest["pairs"]) == ("harmony_preference", True)
    assert manifest["prompts"] == {"system": None, "developer": None}, "rows bring their own"
    assert sum(split["rows"] for split in manifest["splits"].values()) == 240
    seen = {}
    for split, entry in manifest["splits"].items():
        for shard in entry["shards"]:
            triple = read_triple(folder / split, shard["name"])
            assert triple.documents % 2 == 0
            for pair in range(triple.documents // 2):
                sides = [Parser(FULL).messages(triple.tokens[triple.place(d)][:-1]) for d in (2 * pair, 2 * pair + 1)]
                assert sides[0][0] == sides[1][0]
                seen[sides[0][0].content] = (sides[0][1].content, sides[1][1].content)
    assert seen == {row["prompt"]: (row["chosen"], row["rejected"]) for row in preference_rows(120)}
    assert verify(folder) == []


def test_verify_sees_pairs_that_are_none(tmp_path: Path) -> None:
    folder = preference_dataset(tmp_path)
    manifest = read_manifest(folder)
    entry = manifest["splits"]["train"]["shards"][0]
    path = folder / "train" / f"{entry['name']}_tokens.bin"
    tokens = np.fromfile(path, np.int32)
    where = int(np.flatnonzero(tokens == FULL.encode_ordinary("what")[0])[0])
    tokens[where] = FULL.encode_ordinary("who")[0]
    tokens.tofile(path)
    entry["files"][path.name] = file_entry(path)
    write_manifest(folder, manifest)
    assert any("1 pairs whose two prompts differ" in fault for fault in verify(folder))


def test_the_training_side_opens_pairs_as_packing_units(tmp_path: Path) -> None:
    from megatron_vpmoe.data.kd_dataset import KDDataset
    from megatron_vpmoe.data.pairs import grouped_lengths

    folder = preference_dataset(tmp_path)
    dataset = KDDataset.open(folder, "train", seq_length=96, padded_vocab_size=201_088)
    assert dataset.manifest.group_size == 2
    pairs = grouped_lengths(dataset.lengths, dataset.manifest.group_size, seq_length=96)
    assert len(pairs) == len(dataset) // 2 and pairs.max() <= 96


@pytest.mark.parametrize(
    ("rows", "fault", "remedy"),
    [
        ([{"prompt": "q " * 100, "completion": "a " * 100}], "none of the 1 rows", "--seq-len"),
        ([{"prompt": "q", "tools": ["t"]}] * 2, "all 2 rows were rejected .unknown_key:tools 2", "mend the source"),
        ([], "the input holds no rows", "mend the source"),
    ],
)
def test_rows_that_all_go_leave_no_dataset(tmp_path: Path, rows: list[dict], fault: str, remedy: str) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    kind = ChatDataset(BuildOptions(seq_len=32, strict=False))
    with pytest.raises(DataError, match=fault) as refused:
        build_sequential(resolve(str(path)), tmp_path / "out", kind, Pass(), quiet=True)
    assert remedy in str(refused.value.remedy)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (HealingText(BuildOptions(valid_fraction=0), id_field="id"), lambda i: {"text": f"text {i}"}),
        (ChatDataset(BuildOptions(), id_field="id"), lambda i: {"prompt": f"q {i}", "completion": "a"}),
        (ChatDataset(BuildOptions(), pairs=True, id_field="id"), lambda i: preference_rows(i + 1)[i]),
    ],
)
def test_rows_with_the_id_of_another_are_counted(
    tmp_path: Path, kind: HealingText | ChatDataset, row: Callable[[int], dict]
) -> None:
    ids = ["a", 1, "b", "a", "1", "c", "a"]
    path = write(tmp_path / "rows.jsonl", [{"id": own, **row(i)} for i, own in enumerate(ids)])
    manifest = build_sequential(resolve(str(path)), tmp_path / "out", kind, Pass(shard_tokens=1), quiet=True)
    assert manifest["documents"]["repeated_ids"] == 3
