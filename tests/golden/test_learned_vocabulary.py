"""A model with a BPE of its own, from texts to a chat: trained by every objective, asked, measured, exported and back.

It is taught without a system message: its conversations begin with the user's.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vpmoe.generation import engine
from megatron_vpmoe.generation.prompts import Completion
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.training import loop
from tests.golden.test_preferences import settings
from tests.learned_vocabulary import SENTENCES, write_vocabulary
from vpmoe.app.talk import Slot, ask
from vpmoe.cli import main
from vpmoe.data_curation.tasks.synth_mini import make_row
from vpmoe.eval.asking import AsConversation
from vpmoe.eval.conversation import Answer, open_conversation
from vpmoe.eval.open_model import open_model
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.hf.convert import export_checkpoint, import_directory, open_directory
from vpmoe.steps import RECEIPT
from vpmoe.tokenizer.hf_directory import HFDirectory

pytestmark = pytest.mark.slow
QUESTION = "What did Mia find?"
TASKS = "special_tokens_as_text,copying,special_tokens,harmony,pinned"
ROWS = {
    "text": [{"text": f"{SENTENCES[i % 3]} {i}"} for i in range(60)],
    "chat": [{"prompt": f"{QUESTION} {i}", "completion": f"Mia found {i} balls."} for i in range(60)],
    "pairs": [{"prompt": f"{QUESTION} {i}", "chosen": f"Mia, {i}", "rejected": f"Tom, {i}"} for i in range(60)],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text/, chat/ and pairs/ with a run of each beside it, and one that is rewarded for its answers."""
    folder, weights = tmp_path_factory.mktemp("own"), dict[str, Any]()
    vocabulary = ["--tokenizer", str(write_vocabulary(folder / "vocabulary")), "--padded-vocab-size", "320"]
    for kind, rows in ROWS.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths = ["--input", str(folder / f"{kind}.jsonl"), "--output-dir", str(folder / kind)]
        split = ["--seq-len", "192", "--valid-fraction", "0.2", "--quiet"]
        assert main(["data", f"build-{kind}", *paths, *vocabulary, *split]) == 0
    prompts = ["--input", str(folder / "chat.jsonl"), "--dataset", str(folder / "chat"), "--field", "prompt"]
    assert main(["data", "prompts", *prompts, "--output", str(folder / "prompts.jsonl")]) == 0
    rewarded = {
        "rewards": [{"function": "tests.training_runs:even_tokens"}],
        "rollout_prompts": folder / "prompts.jsonl",
        "rollout_groups": 2,
        "rollout_group_size": 4,
        "rollout_max_new_tokens": 8,
    }
    for name, data, objective, more in (
        ("pretrained", "text", "token_ce", {}),
        ("taught", "chat", "span_ce", {"eval_interval": 1, "sample_interval": 1}),
        ("preferring", "pairs", "dpo", {"reference_weights": folder / "taught"}),
        ("rewarded", "chat", "grpo", rewarded),
    ):
        fields = settings(folder / data, objective=objective, train_iters=1, **weights, **more)
        with distributed.single_process(seed=1234):
            loop.train(tiny(folder / name, fields))
        weights = {"load_weights": folder / name}
    return folder


def tiny(run: Path, fields: dict[str, Any]) -> Any:
    from tests.tiny import tiny_config

    return tiny_config(run_dir=run, **fields)


def prompt_of(runs: Path, *turns: Message) -> str:
    tokenizer = HFDirectory(runs / "vocabulary")
    return tokenizer.decode(FastRenderer(tokenizer).generation_prompt(turns))


def test_every_stage_can_be_asked_and_says_so_in_its_own_ids(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pretrained", "taught", "preferring", "rewarded"):
        assert main(["sample", str(runs / name), QUESTION, "--max-new-tokens", "2"]) == 0
        told = capsys.readouterr()
        shown = prompt_of(runs, Message("user", QUESTION))
        assert shown in told.out
        expected = "stored with" if name == "pretrained" else "(none)"
        assert expected in told.err
        valid = ["--only-valid", "--max-new-tokens", "60", "--temperature", "1"]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What?\nAnd then?\n"), encoding="utf-8"))
        assert main(["chat", str(runs / name), *valid]) == 0
        assert capsys.readouterr().out.count("final: ") == 2
    sampled = [json.loads(line) for line in (runs / "taught" / "samples.jsonl").read_text().splitlines()]
    assert sampled and all(one["prompt"].startswith("<|start|>user<|message|>") for one in sampled)


def test_a_conversation_is_the_users_message_alone_in_the_app_too(runs: Path) -> None:
    with open_model(runs / "preferring") as opened:
        assert opened.prompts == () and isinstance(opened.tokenizer, HFDirectory)
        draw = {"max_new_tokens": 60, "temperature": 1.0}
        conversation = open_conversation(opened, draw, only_valid=True)
        assert isinstance(conversation.form, AsConversation) and conversation.form.context == ()
        slot, held = Slot(), _held(opened)
        settings = {"draw": draw, "plain": False, "reasoning": None, "only_valid": True, "cached": True}
        ask(slot, held, QUESTION, settings, lambda turn: None)
        assert [message.role for message in slot.said] == ["user", "assistant"] and not slot.turns[0].note


def test_a_missing_analysis_is_a_fault_only_where_a_message_asks_for_one(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_model(runs / "taught") as opened:
        special, said = opened.tokenizer.special_id, opened.tokenizer.encode_ordinary
        ids = [special("<|channel|>"), *said("final"), special("<|message|>"), *said("A ball."), special("<|return|>")]
        answer = Completion(0, 0, 0, [*map(int, ids)], finish="stop")
        monkeypatch.setattr(engine, "generate", lambda *_, watch, **__: watch(answer) or [answer])
        for system, fault in ((None, None), ("Be kind.", None), ("# Valid channels: analysis, final.", "no_analysis")):
            conversation = open_conversation(opened, {"max_new_tokens": 9}, system=system)
            assert conversation.ask(QUESTION, Answer(conversation.form)).fault == fault


def _held(opened: Any) -> Any:
    from vpmoe.app.models import Held

    return Held(opened)


def test_suites_measure_it(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taught = str(runs / "taught")
    (tmp_path / "questions.jsonl").write_text(json.dumps(make_row(0, 1, {"sorting": 1.0})) + "\n")
    for name, words in {
        "nano": ["nano", taught, "--questions", str(tmp_path / "questions.jsonl"), "--max-new-tokens", "2"],
        "texts": ["text", taught, "--texts", str(runs / "text.jsonl")],
        "dataset": ["text", taught, "--data-path", str(runs / "chat")],
        "canaries": ["canaries", taught, "--tasks", TASKS, "--max-new-tokens", "2", "--context", "2048"],
    }.items():
        assert main(["eval", *words, "--output", str(tmp_path / f"{name}.json")]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "canaries.json").read_text())
    assert report["tasks"]["special_tokens_as_text"]["accuracy"] == 1.0 and report["asked"]["form"] == "conversation"
    assert json.loads((tmp_path / "texts.json").read_text())["tasks"]["text"]["tokens"] > 500


def test_an_export_chats_as_the_run_does_and_comes_back_the_same(runs: Path, tmp_path: Path) -> None:
    exported = export_checkpoint(runs / "taught", tmp_path / "hf").path
    theirs = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    ours = HFDirectory(runs / "vocabulary")
    text = "so the fox 12 <|end|> unseen 🙂"
    assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode_ordinary(text).tolist()
    turns = [Message("user", QUESTION), Message("assistant", "A ball.", "final"), Message("user", "And?")]
    said = [{"role": turn.role, "content": turn.content} for turn in turns]
    for count in (1, 3):
        templated = theirs.apply_chat_template(said[:count], tokenize=False, add_generation_prompt=True)
        assert templated == prompt_of(runs, *turns[:count])

    model: Any = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    ends = [ours.special_id(name) for name in ("<|return|>", "<|call|>", "<|endoftext|>")]
    assert model.generation_config.eos_token_id == model.config.eos_token_id == ends
    assert model.generation_config.pad_token_id == theirs.pad_token_id == ours.eod_id
    questions = [said[:1], [{"role": "user", "content": f"{QUESTION} {QUESTION}"}]]
    batch = theirs.apply_chat_template(questions, add_generation_prompt=True, padding=True, return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch["input_ids"].shape[1] :].tolist()
    with open_model(exported) as opened, torch.no_grad():
        assert opened.prompts == ()
        conversation = open_conversation(opened, {"max_new_tokens": 4})
        outcome = conversation.ask(QUESTION, Answer(conversation.form))
        assert outcome.completion is not None and outcome.completion.ids == written

    again = import_directory(open_directory(exported), tmp_path / "again")
    twice = export_checkpoint(again.path, tmp_path / "hf_twice").path
    files, as_many = ({path.name for path in folder.iterdir()} - {RECEIPT} for folder in (exported, twice))
    assert files == as_many and {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= files
    assert [name for name in files if (exported / name).read_bytes() != (twice / name).read_bytes()] == []
