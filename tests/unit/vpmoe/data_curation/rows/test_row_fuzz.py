"""Whatever rows are made of: each is used whole or rejected in its place; nothing is lost, nothing else raises."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import fuzz_settings
from vpmoe.data_curation.conversations.chat_rows import chat_messages, preference_pair
from vpmoe.data_curation.conversations.synth import COLUMNS, to_conversation
from vpmoe.data_curation.datasets.chat import ChatDataset
from vpmoe.data_curation.datasets.encode import Block
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.datasets.text import HealingText
from vpmoe.data_curation.rows.source import resolve
from vpmoe.errors import DataError, RowError, TokenizerError
from vpmoe.harmony.conversation import check_conversation
from vpmoe.harmony.prompts import Prompts
from vpmoe.tokenizer.o200k_harmony import load_o200k_harmony

BASE = BuildOptions(seq_len=64, valid_fraction=0)
KINDS = (HealingText(BASE), ChatDataset(BASE), ChatDataset(BASE, pairs=True))
ENCODERS = [kind.encoder(load_o200k_harmony()) for kind in KINDS]
BOM = b"\xef\xbb\xbf"
TEXTS = st.sampled_from(["q", "a", "", " ", "x\0", "\ud800", "<think>t</think>a", "<think>", "é漢", "user", "final"])
KEYS = st.sampled_from(
    [*COLUMNS, "role", "content", "channel", "thinking", "reasoning_content", "reasoning", "messages", "prompt", "text"]
) | st.sampled_from(["completion", "chosen", "rejected", "tools", "weight", "id", "source", "name", "created_at"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | TEXTS
INNER = SCALARS | st.lists(SCALARS, max_size=2)
VALUES = INNER | st.dictionaries(KEYS, INNER, max_size=3)
SAID = st.sampled_from(["one", "two", "<think>\nthree\n</think>\n\nfour", "<think></think>five", "<think>six"])
USER = st.fixed_dictionaries({"role": st.just("user"), "content": st.sampled_from(["one", "what is <think>?"])})
ASSISTANT = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": SAID},
    optional={
        "channel": st.sampled_from([None, "final"]),
        "thinking": st.sampled_from([None, "", "three"]),
        "reasoning_content": st.sampled_from([None, " ", "three", "seven"]),
    },
)
CONVERSATIONS = st.lists(st.tuples(USER, ASSISTANT), min_size=1, max_size=2).map(lambda turns: list(chain(*turns)))
CHATS = st.one_of(
    st.fixed_dictionaries({"messages": CONVERSATIONS}, optional={"prompt": st.sampled_from(["one", "two", ""])}),
    st.fixed_dictionaries({"prompt": SAID, "completion": SAID | ASSISTANT}),
    st.fixed_dictionaries({"prompt": SAID | st.lists(USER, max_size=1), "chosen": SAID, "rejected": ASSISTANT | SAID}),
    st.fixed_dictionaries({"chosen": CONVERSATIONS, "rejected": CONVERSATIONS}),
)


@st.composite
def near_chats(draw: st.DrawFn) -> dict[str, Any]:
    """Chat rows, most with something in row or messages that may or may not be understood."""
    row = draw(CHATS)
    for _ in range(draw(st.integers(0, 2))):
        messages = [entry for value in row.values() if isinstance(value, list) for entry in value]
        place = draw(st.sampled_from([row, *(entry for entry in messages if isinstance(entry, dict))]))
        place[draw(KEYS)] = draw(VALUES)
    return row


ROWS = near_chats() | near_chats() | st.dictionaries(KEYS, VALUES, max_size=6)


def said_in(value: Any) -> Iterator[str]:
    """Texts of a row that say something: all but roles, channels and bookkeeping."""
    if isinstance(value, dict):
        kept = (inner for key, inner in value.items() if key not in UNSAID)
        yield from chain(*map(said_in, kept))
    elif isinstance(value, list):
        yield from chain(*map(said_in, value))
    elif value is not None:
        yield from (part.strip() for part in str(value).removeprefix("<think>").split("</think>"))


UNSAID = ("role", "channel", "id", "source", "created_at", "synth_id", "language", "model")


@fuzz_settings(200)
@given(ROWS)
def test_a_chat_row_that_is_accepted_is_used_whole(row: dict[str, Any]) -> None:
    for read in (chat_messages, lambda row: tuple(chain(*preference_pair(row)))):
        try:
            messages = read(row)
        except RowError as error:
            assert error.reason and error.what
            continue
        contents = "\n".join(message.content for message in messages)
        assert not [text for text in said_in(row) if text not in contents]
        assert all(message.content.strip() for message in messages)


def becomes_something(row: Any) -> None:
    """Every reader of rows gives something of it, or says why not."""
    if isinstance(row, RowError):
        assert row.reason and row.what
        return
    assert ascii(dict(row))
    for encoder in ENCODERS:
        block = Block("shard")
        try:
            block.add(encoder.encode(row))
        except (RowError, TokenizerError) as error:
            block.reject({}, error, "")
    try:
        check_conversation(to_conversation(row, Prompts()).messages)
    except RowError as error:
        assert error.reason


def with_bytes(line: bytes, place: int, put: bytes) -> bytes:
    place %= len(line)
    return line[:place] + put + line[place + 1 :]


JSON = st.builds(
    lambda row, ascii_only: json.dumps(row, ensure_ascii=ascii_only).encode(errors="surrogatepass"), ROWS, st.booleans()
)
LINES = (
    JSON
    | st.builds(with_bytes, JSON, st.integers(0, 1 << 20), st.binary(max_size=3))
    | st.integers(1, 3000).map(lambda depth: b'{"text": ' + b"[" * depth + b"]" * depth + b"}")
    | st.binary(max_size=12)
    | st.sampled_from([b"", b" ", BOM, b'{"text": "t", "text": "u"}', b"NaN", b'{"text": 1e999}'])
)


@fuzz_settings(100)
@given(st.lists(LINES, max_size=5))
def test_every_line_is_a_row_or_a_reject(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = dict(resolve(str(path)).open())
    written = enumerate(path.read_bytes().split(b"\n"), start=1)
    assert list(found) == [f"rows.jsonl:{number}" for number, line in written if line.removeprefix(BOM).strip()]
    for row in found.values():
        becomes_something(row)


def parquet_bytes(compression: str) -> bytes:
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"text": f"line {n} é", "messages": turn, "number": n, "bytes": b"b", "when": None} for n in range(40)]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, compression=compression, row_group_size=16)
    return out.getvalue()


WHOLE = {name: parquet_bytes(name) for name in ("zstd", "snappy", "none")}
DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=40)), min_size=1, max_size=4)


@fuzz_settings(150)
@given(compression=st.sampled_from(sorted(WHOLE)), damage=DAMAGE, keeps_length=st.booleans())
def test_a_damaged_parquet_file_gives_rows_or_is_named(
    tmp_path: Path, compression: str, damage: list[tuple[float, bytes]], keeps_length: bool
) -> None:
    content = bytearray(WHOLE[compression])
    for where, put in damage:
        place = int(where * len(content))
        content[place : place + (len(put) if keeps_length else 2)] = put
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    try:
        for _, row in resolve(str(path)).open():
            becomes_something(row)
    except DataError as error:
        assert str(path) in str(error) and error.remedy
