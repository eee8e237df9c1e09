"""lm-eval runs on an exported directory and finds what the weights say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import ROOT
from tests.tiny_student import write_student, write_vocabulary
from tests.workers import Started, as_programs
from vpmoe.data_curation.tasks.question_texts import prompt
from vpmoe.data_curation.tasks.synth_mini import generate
from vpmoe.eval.suites.finished import Finished
from vpmoe.hf.convert import export_checkpoint
from vpmoe.hf.tokenizer_files import open_tokenizer

pytestmark = pytest.mark.slow
ROWS, LIMIT = 384, 6


def test_both_tasks(tmp_path: Path) -> None:
    generate(tmp_path / "data" / "synth_mini", rows=1, seed=1, families={"addition": 1.0})
    assets = write_vocabulary(tmp_path / "vocabulary", "Question: What is 1 2 3 4 5 6 7 8 9 0? Answer: Add and", ROWS)
    checkpoint = write_student(tmp_path / "megatron", assets=assets, padded_vocab_size=ROWS)
    exported = export_checkpoint(checkpoint, tmp_path / "hf").path
    tasks = ["synth_mini_answers", "synth_mini_likelihood"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}

    def run(*programs: tuple[str, ...]) -> None:
        done = Started(as_programs, *programs, environment=offline, folder=tmp_path).finish(timeout=600)
        assert done.returncode == 0, done.stderr

    def by_lm_eval(module: str, model: str, arguments: str, *words: str) -> tuple[str, ...]:
        words += ("--include_path", str(ROOT / "configs" / "eval" / "lm_eval"), "--tasks", ",".join(tasks))
        words += ("--limit", str(LIMIT), "--output_path", model, "--log_samples", "--batch_size", "2")
        return (module, "run", "--model", model, "--model_args", arguments, *words)

    def written(model: str) -> tuple[dict[str, Any], list[float]]:
        """The results, and the log-likelihood of every answer."""
        out = tmp_path / model
        lines = next(out.rglob("samples_synth_mini_likelihood_*.jsonl")).read_text().splitlines()
        likelihoods = [float(json.loads(line)["resps"][0][0][0]) for line in lines]
        return json.loads(next(out.rglob("results_*.json")).read_text())["results"], likelihoods

    run(
        by_lm_eval("lm_eval", "hf", f"pretrained={exported},trust_remote_code=True,dtype=float32", "--device", "cpu"),
        by_lm_eval("vpmoe.eval.suites.lm_eval_model", "vpmoe", f"pretrained={checkpoint}"),
    )
    (found, expected), (direct, likelihoods) = written("hf"), written("vpmoe")
    assert likelihoods == pytest.approx(expected, abs=1e-4) and len(likelihoods) == LIMIT
    assert found.keys() == set(tasks) and 0 <= found["synth_mini_answers"]["exact_match,first_line"] <= 1

    # The same tasks on the checkpoint itself, by our own forward pass.
    ours = ("vpmoe.cli", "eval", "lm-eval", str(checkpoint), "--tasks", ",".join(tasks))
    ours += ("--include-path", str(ROOT / "configs" / "eval" / "lm_eval"), "--limit", str(LIMIT), "--batch-size", "3")
    run((*ours, "--output", "ours.json"))
    entries = json.loads((tmp_path / "ours.json").read_text())["tasks"]
    for task, numbers in found.items():
        for name, value in numbers.items():
            if name.split(",")[0] in ("exact_match", "perplexity", "acc"):
                assert entries[task][name] == pytest.approx(value, rel=1e-4), (task, name)
                assert direct[task][name] == pytest.approx(value, rel=1e-4), (task, name)
        right = Finished.read(tmp_path / "ours.json").items[task].values()
        share = found[task].get("exact_match,first_line", found[task].get("acc,none"))
        assert len(right) == LIMIT and sum(item["correct"] for item in right) / LIMIT == share

    model: Any = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    tokenizer = open_tokenizer(exported)
    lines = (tmp_path / "data" / "synth_mini" / "test.jsonl").read_text().splitlines()[:LIMIT]
    total = 0.0
    for row in map(json.loads, lines):
        # lm-eval gives the blank before an answer to the answer, as the tokens do.
        start, whole = (
            tokenizer(text)["input_ids"]
            for text in (prompt(row["query"]), f"{prompt(row['query'])} {row['synthetic_answer']}")
        )
        with torch.no_grad():
            logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        total += sum(float(logs[at - 1, whole[at]]) for at in range(len(start), len(whole)))
    assert math.log(found["synth_mini_likelihood"]["perplexity,none"]) == pytest.approx(-total / LIMIT, rel=1e-5)
