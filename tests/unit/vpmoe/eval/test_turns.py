"""What ends a turn: one list, supervised in every turn of a conversation, and never inside of one."""

from __future__ import annotations

import json
import random
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.data.batch import Document, assemble
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.prompts import Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.training.run import open_run
from megatron_vpmoe.training.step import train_step
from megatron_vpmoe.turns import MESSAGE_END, TURN_END, generation_ends
from tests.conftest import fuzz_settings
from tests.tiny import ROOT, tiny_config
from vpmoe.data_curation.datasets.chat import ChatDataset, ChatEncoder
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.datasets.sequential import Pass, build_sequential
from vpmoe.data_curation.rows.source import resolve
from vpmoe.eval.asking import stop_ids
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.parse import Parser
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.tokenizer import CompactVocabulary, load_tokenizer
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE, load_o200k_harmony

FULL = load_o200k_harmony()
STOPS = set(stop_ids(FULL))
TEXTS = st.sampled_from(["a", "so be it", "<|end|>", "<|return|>", "漢字 é", "<|start|>user"])


@st.composite
def chats(draw: st.DrawFn) -> list[Message]:
    messages = [Message(role, draw(TEXTS)) for role in ("system", "developer") if draw(st.booleans())]
    for _ in range(draw(st.integers(1, 4))):
        messages.append(Message("user", draw(TEXTS)))
        messages += [Message("assistant", draw(TEXTS), "analysis")] * draw(st.booleans())
        messages.append(Message("assistant", draw(TEXTS), "final"))
    return messages


def as_row(messages: list[Message]) -> dict:
    return {"messages": [{"role": m.role, "content": m.content, "channel": m.channel} for m in messages]}


@pytest.mark.parametrize("supervise", ["all", "last"])
def test_every_supervised_turn_ends_in_a_stop_and_none_falls_inside(supervise) -> None:
    encoder = ChatEncoder(ChatDataset(BuildOptions(seq_len=1 << 12, valid_fraction=0), supervise=supervise), FULL)
    ends = (FULL.special_id(MESSAGE_END), FULL.special_id(TURN_END))

    @fuzz_settings(max_examples=60)
    @given(chats())
    def hold(messages: list[Message]) -> None:
        stored = encoder.encode(as_row(messages)).documents
        assert stored is not None
        document = Document(stored.tokens, stored.lossmask, stored.span, ends)
        batch = assemble([[document]], seq_length=len(stored.tokens), eod_id=FULL.eod_id, sample_ids=[0])
        labels = np.where(batch.loss_mask[0], batch.labels[0], -1).tolist()
        answers = [item for item in Parser(FULL).parse(stored.tokens[:-1]) if item.message.channel == "final"]
        # The label of the place before an answer's last token; what is read there is Harmony's own rendering.
        expected = {item.stop - 2 for item in answers[-1:] + answers * (supervise == "all")}
        assert {place for place, label in enumerate(labels) if label in STOPS} == expected
        assert {labels[place] for place in expected} == {ends[1]}
        same = [place for place, label in enumerate(labels) if label >= 0 and place not in expected]
        assert all(labels[place] == stored.tokens[place + 1] for place in same)

    hold()


def test_exports_ladders_and_samples_stop_where_evaluation_does() -> None:
    assert set(generation_ends(FULL.special_tokens).values()) == STOPS
    for ladder in ("upcycle", "nano"):
        objects = tomllib.loads((ROOT / "configs" / ladder / "ladder.toml").read_text())["objects"]
        (job,) = [entry for entry in objects.values() if entry.get("job") == "vocabulary"]
        assert job["settings"]["eos_tokens"] == list(generation_ends(FULL.special_tokens))


def echoes(draw: random.Random, turns: int) -> list[Message]:
    """A conversation in which the assistant thinks, and then says, what the user said."""
    letters = draw.choices("abcdefgh", k=turns)
    form = (("user", None), ("assistant", "analysis"), ("assistant", "final"))
    return [Message(role, letter, channel) for letter in letters for role, channel in form]


def echo_dataset(folder: Path) -> Path:
    draw = random.Random(0)
    rows = [json.dumps(as_row(echoes(draw, 3))) + "\n" for _ in range(400)]
    (folder / "rows.jsonl").write_text("".join(rows))
    words = [int(FULL.encode_ordinary(word)[0]) for word in ("user", "assistant", "analysis", "final")]
    CompactVocabulary.from_counts(FULL, np.bincount(words, minlength=VOCAB_SIZE)).save(folder / "map.npy")
    base = BuildOptions(seq_len=96, valid_fraction=0.1, compact_map=folder / "map.npy", padded_vocab_size=320)
    build_sequential(resolve(str(folder / "rows.jsonl")), folder / "built", ChatDataset(base), Pass(), quiet=True)
    return folder / "built"


def test_a_trained_model_ends_every_turn_and_never_speaks_for_the_user(tmp_path: Path, single_process) -> None:
    data = echo_dataset(tmp_path)
    dense = {"num_experts": None, "moe_router_num_groups": None, "moe_router_group_topk": None, "num_layers": 2}
    sizes = {"hidden_size": 64, "ffn_hidden_size": 64, "window_size": 32, "seq_length": 128, "padded_vocab_size": 320}
    how = {"objective": "token_ce", "lr": 1e-2, "normuon_aux_lr": 1e-2, "lr_decay_style": "constant"}
    cfg = tiny_config(**dense, **sizes, **how, window_attn_skip_freq=2, data_path=data, run_dir=tmp_path / "run")
    run = open_run(cfg)
    for _ in range(80):
        train_step(run.wrapped, run.optimizer, run.objective, run.source.next_step().batches)
        run.scheduler.step(1)
    run.source.close()
    tokenizer = load_tokenizer(data)
    renderer = FastRenderer(tokenizer)
    draw = random.Random(1)
    chats = [messages[: 3 * turn + 1] for messages in [echoes(draw, 3) for _ in range(8)] for turn in range(3)]
    options = SamplingOptions(40, stop_ids(tokenizer))
    prompts = [Prompt(renderer.generation_prompt(chat).tolist()) for chat in chats]
    answers = [one.ids for one in generate(run.model, prompts, options)]
    said = "<|channel|>analysis<|message|>{0}<|end|><|start|>assistant<|channel|>final<|message|>{0}<|return|>"
    right = [tokenizer.decode(ids) == said.format(chat[-1].content) for chat, ids in zip(chats, answers, strict=True)]
    assert all(tokenizer.decode(ids).endswith("<|return|>") for ids in answers)
    assert sum(right) >= 22
