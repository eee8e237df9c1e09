"""What ends a turn: one list, supervised in every turn of a conversation, and never inside of one."""

from __future__ import annotations

import io
import json
import random
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.data.batch import Document, assemble
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.training.run import open_run
from megatron_vpmoe.training.step import train_step
from megatron_vpmoe.turns import MESSAGE_END, TURN_END, generation_ends
from tests.conftest import fuzz_settings
from tests.tiny import ROOT, tiny_config
from vpmoe.cli import main
from vpmoe.data_curation.datasets.chat import ChatDataset, ChatEncoder
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.datasets.sequential import Pass, build_sequential
from vpmoe.data_curation.rows.source import resolve
from vpmoe.eval.asking import decode_in_batches, form_of, stop_ids
from vpmoe.eval.open_model import open_model
from vpmoe.eval.questions import Question
from vpmoe.eval.scoring import score
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.parse import Parser
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.hf.convert import export_checkpoint
from vpmoe.tokenizer import CompactVocabulary
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
        ended = 0
        for stop, length in zip(np.cumsum(stored.lengths).tolist(), stored.lengths.tolist(), strict=True):
            tokens, mask, span = (signal[stop - length : stop] for signal in stored[:3])
            document = Document(tokens, mask, span, ends)
            batch = assemble([[document]], seq_length=length, eod_id=FULL.eod_id, sample_ids=[0])
            labels = np.where(batch.loss_mask[0], batch.labels[0], -1).tolist()
            answers = [item for item in Parser(FULL).parse(tokens[:-1]) if item.message.channel == "final"]
            # The label of the place before an answer's last token; what is read there is Harmony's own rendering.
            expected = {item.stop - 2 for item in answers if mask[item.stop - 2]}
            assert answers[-1].stop - 2 in expected
            assert {place for place, label in enumerate(labels) if label in STOPS} == expected
            assert {labels[place] for place in expected} == {ends[1]}
            same = [place for place, label in enumerate(labels) if label >= 0 and place not in expected]
            assert all(labels[place] == tokens[place + 1] for place in same)
            ended += len(expected)
        assert ended == (1 if supervise == "last" else sum(message.role == "user" for message in messages))

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to echo, in seconds; its conversations begin with messages of their own."""
    folder, draw = tmp_path_factory.mktemp("echo"), random.Random(0)
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"id": f"row {n}", **as_row(echoes(draw, 3))}) + "\n" for n in range(400))
    )
    words = [int(FULL.encode_ordinary(word)[0]) for word in ("user", "assistant", "analysis", "final", "system")]
    CompactVocabulary.from_counts(FULL, np.bincount(words, minlength=VOCAB_SIZE)).save(folder / "map.npy")
    base = BuildOptions(seq_len=96, valid_fraction=0.1, compact_map=folder / "map.npy", padded_vocab_size=320)
    chats = ChatDataset(base, system_text="You echo.", id_field="id")  # there are but eight first answers
    build_sequential(resolve(str(folder / "rows.jsonl")), folder / "built", chats, Pass(), quiet=True)
    sizes = {"hidden_size": 64, "ffn_hidden_size": 64, "window_size": 32, "seq_length": 128, "padded_vocab_size": 320}
    sizes |= {"moe_ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 64}
    how = {"load_weights": None, "lr": 1e-2, "normuon_aux_lr": 1e-2, "min_lr": 1e-3, "train_iters": 160}
    cfg = tiny_config(file="sft.yaml", **sizes, **how, data_path=folder / "built", run_dir=folder / "run")
    with distributed.single_process(seed=1234):
        run = open_run(cfg)
        for _ in range(160):
            train_step(run.wrapped, run.optimizer, run.objective, run.source.next_step().batches)
            run.scheduler.step(1)
        run.save()
        run.settle()
        run.source.close()
    return folder / "run"


SAID = "<|channel|>analysis<|message|>{0}<|end|><|start|>assistant<|channel|>final<|message|>{0}<|return|>"


@pytest.mark.slow
def test_a_trained_model_ends_every_turn_and_never_speaks_for_the_user(trained: Path) -> None:
    draw = random.Random(1)
    whole = [messages[: 3 * turn + 1] for messages in [echoes(draw, 3) for _ in range(8)] for turn in range(3)]
    chats = [[message for message in messages if message.channel != "analysis"] for messages in whole]
    with open_model(trained) as opened:
        renderer, options = FastRenderer(opened.tokenizer), SamplingOptions(40, stop_ids(opened.tokenizer))
        prompts = [renderer.generation_prompt([*opened.prompts, *chat]).tolist() for chat in chats]
        answers = [opened.tokenizer.decode(ids) for ids in decode_in_batches(opened.model, prompts, options, 8)]
    assert all(answer.endswith("<|return|>") for answer in answers)
    assert sum(answer == SAID.format(chat[-1].content) for chat, answer in zip(chats, answers, strict=True)) >= 22


@pytest.mark.slow
def test_it_chats(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n/reset\nc\n"))
    assert main(["chat", str(trained), "--max-new-tokens", "40"]) == 0
    assert capsys.readouterr().out == "".join(f"analysis: {said}\nfinal: {said}\n" for said in "abc")


@pytest.mark.slow
def test_the_documented_chat_call_answers_as_our_evaluation_does(trained: Path, tmp_path: Path) -> None:
    """Question by question, in transformers alone, which is told the user's message and nothing else."""
    rows = [{"query": letter, "exercise": "echo", "synthetic_answer": letter} for letter in "abcdefgh"]
    with open_model(trained) as opened:
        form, tokenizer = form_of(opened, plain=False, system=None, developer=None, say=print), opened.tokenizer
        prompts, options = [form.prompt(row["query"]) for row in rows], SamplingOptions(40, form.stop_ids)
        ours = decode_in_batches(opened.model, prompts, options, 3)
    hf = str(export_checkpoint(trained, tmp_path / "hf").path)
    pipeline = transformers.pipeline("text-generation", model=hf, trust_remote_code=True, device="cpu")
    theirs, texts = [], []
    for row in rows:
        chat = [{"role": "user", "content": row["query"]}]
        asked = pipeline.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        made = pipeline.model.generate(**asked, max_new_tokens=40)[0, asked["input_ids"].shape[1] :]
        theirs.append(made.tolist())
        texts.append(pipeline(chat, max_new_tokens=40)[0]["generated_text"][-1])
    assert theirs == ours
    plain = [tokenizer.decode([token for token in ids if not tokenizer.is_special(token)]) for ids in ours]
    assert texts == [{"role": "assistant", "content": text} for text in plain]
    scored = score([Question(row) for row in rows], theirs, form, lambda text, row: text == row["synthetic_answer"])
    assert sum(item.exact for item in scored) >= 7
