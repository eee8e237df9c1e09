"""A real checkpoint evaluated on a real dataset; the model is untrained, or plays a part written by hand."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vpmoe.errors import CheckpointError, DataError, NotOursError, TokenizerError
from megatron_vpmoe.manifest import read_manifest
from tests.tiny import tiny_config
from tests.unit.vpmoe.eval.conftest import GOOD, ids_of
from tests.unit.vpmoe.test_provenance_blocks import whole
from vpmoe.cli import main
from vpmoe.eval import open_model as open_model_module
from vpmoe.eval import valid_split
from vpmoe.eval.asking import decode_in_batches, stop_ids
from vpmoe.eval.nano import NanoOptions, evaluate_and_plot, evaluate_model
from vpmoe.eval.open_model import open_model
from vpmoe.eval.questions import read_questions
from vpmoe.harmony.parse import Parser
from vpmoe.hf.convert import export_checkpoint

pytestmark = pytest.mark.slow


def options(data: Path, **changes) -> NanoOptions:
    fields = {"per_family": 3, "max_new_tokens": 12, "batch_size": 5, "samples": 4, **changes}
    return NanoOptions(questions=data / "rows" / "test.jsonl", **fields)


def evaluate(model: Path, chosen: NanoOptions, output: Path, *, overwrite: bool = False) -> dict:
    return evaluate_and_plot(model, chosen, output, overwrite=overwrite, progress=silent)


def silent(line: str) -> None:
    assert line


def test_report_of_an_untrained_model(data: Path, run_directory: Path, tmp_path: Path, capsys) -> None:
    report = evaluate(run_directory, options(data), tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert report["checkpoint"]["iteration"] == 0
    block, manifest = report["provenance"], read_manifest(data / "dataset")
    assert whole(block) and block["tokenizer"] == manifest.tokenizer.identity()
    assert block["dataset_manifest_sha256"] == manifest.sha256
    # Before any step the model knows nothing: each span costs about ln(vocabulary).
    for span in ("analysis", "final"):
        assert report["losses"][f"loss/{span}"] == pytest.approx(math.log(448), abs=0.5)
    weight = tiny_config().training
    weighted = weight.kd_span_weight_reasoning * report["losses"]["loss/analysis"]
    weighted += weight.kd_span_weight_final * report["losses"]["loss/final"]
    assert report["losses"]["loss/total"] == pytest.approx(weighted, rel=1e-5)
    assert report["tasks"]["all"]["n"] == 12 and report["tasks"]["all"]["exact"] == 0
    items = [json.loads(line) for line in (tmp_path / "report.items.jsonl").read_text().splitlines()]
    assert len({item["item"] for item in items}) == 12 and {item["task"] for item in items} | {"all"} == set(
        report["tasks"]
    )
    assert len(report["samples"]) == 4 and len({sample["family"] for sample in report["samples"]}) == 4
    assert "exact" in capsys.readouterr().out


def test_a_finished_report_is_not_replaced_unasked(data: Path, run_directory: Path, tmp_path: Path) -> None:
    few, output = options(data, per_family=1, max_new_tokens=2), tmp_path / "report.json"
    evaluate(run_directory, few, output)
    before = output.read_bytes()
    with pytest.raises(DataError, match="finished report"):
        evaluate_and_plot(run_directory, few, output, overwrite=False, progress=lambda line: pytest.fail(line))
    assert output.read_bytes() == before
    evaluate(run_directory, few, output, overwrite=True)


def test_losses_of_a_run_without_spans(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A token_ce run has one loss; of its export, text and conversations each have what they can have."""
    from megatron_vpmoe.runtime.distributed import single_process
    from megatron_vpmoe.training.run import open_run

    text = ["--input", str(data / "rows" / "test.jsonl"), "--id-field", "synth_id", "--text-field", "query", "--quiet"]
    text += ["--seq-len", "96", "--valid-fraction", "0.1", "--output-dir", str(tmp_path / "text")]
    text += ["--compact-map", str(data / "dataset" / "compact_vocab.npy"), "--padded-vocab-size", "448"]
    assert main(["data", "build-text", *text]) == 0
    fields = {"padded_vocab_size": 448, "seq_length": 192, "objective": "token_ce"}
    cfg = tiny_config(**fields, data_path=data / "dataset", run_dir=tmp_path / "run")
    with single_process(seed=1):
        run = open_run(cfg)
        run.save()
        run.settle()
        run.source.close()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "tag": "loss/total", "value": 2.0}\n')
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    few = ["--questions", str(data / "rows" / "test.jsonl"), "--per-family", "1", "--max-new-tokens", "2"]
    for model, path, tags in (
        ("run", "dataset", {"loss/total"}),
        ("run", str(tmp_path / "text"), {"loss/total"}),
        ("hf", str(tmp_path / "text"), {"loss/total"}),
        ("hf", "dataset", {"loss/analysis", "loss/final"}),
    ):
        where = [str(tmp_path / model), "--data-path", str(data / path), "--output", str(tmp_path / "report.json")]
        assert main(["eval", "nano", *where, *few]) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert set(report["losses"]) == tags
        assert all(loss == pytest.approx(math.log(448), abs=0.6) for loss in report["losses"].values())
        assert f"{min(tags)}  " in capsys.readouterr().out
        (tmp_path / "report.json").unlink()
        (tmp_path / "report.png").unlink()


@pytest.mark.parametrize("name", ["report.json", "report.png"])
def test_a_file_of_the_users_is_not_replaced(name: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("years of work")
    with pytest.raises(NotOursError, match=name):
        evaluate(tmp_path / "never opened", options(data), tmp_path / "report.json")
    assert (tmp_path / name).read_text() == "years of work"


def test_answers_are_scored_at_their_own_question(data: Path, run_directory: Path, monkeypatch) -> None:
    """The model's place is taken by one that knows every answer but those of sorting, and twice forgets to end."""
    from megatron_vpmoe.generation.prompts import Completion

    questions = read_questions(data / "rows" / "test.jsonl", per_family=3)
    known = {q.query: "0" if q.family == "sorting" else q.row["synthetic_answer"] for q in questions}
    endless = [q.query for q in questions if q.family == "maximum"][:2]
    with open_model(run_directory) as run:
        tokenizer = run.tokenizer
    opening = len(ids_of("<|start|>assistant", tokenizer))

    def answer_from_memory(model, prompts, sampling, **_):
        queries = [Parser(tokenizer).messages(prompt.ids[:-opening])[-1].content for prompt in prompts]
        completions = [ids_of(GOOD.format(known[query]), tokenizer) for query in queries]
        answers = [ids[:-1] if query in endless else ids for query, ids in zip(queries, completions, strict=True)]
        return [Completion(place, 0, 0, ids) for place, ids in enumerate(answers)]

    monkeypatch.setattr("megatron_vpmoe.generation.engine.generate", answer_from_memory)
    report, *_ = evaluate_model(run_directory, options(data), progress=silent)
    counts = {name: (entry["valid"], entry["exact"]) for name, entry in report["tasks"].items()}
    families = {"addition": (3, 3), "subtraction": (3, 3), "maximum": (1, 1), "sorting": (3, 0)}
    assert counts == {**families, "all": (10, 7)}
    assert report["tasks"]["all"]["faults"] == {"unclosed": 2}


def test_batches_give_each_prompt_what_it_gets_alone(data: Path, run_directory: Path) -> None:
    from megatron_vpmoe.generation.engine import generate
    from megatron_vpmoe.generation.prompts import Prompt
    from megatron_vpmoe.generation.sampling import SamplingOptions

    with open_model(run_directory) as run:
        # An untrained model repeats itself; a larger scale makes its choices differ from place to place.
        with torch.no_grad():
            run.model.embedding.word_embeddings.weight.mul_(30)
        generator = torch.Generator().manual_seed(0)
        lengths = (5, 17, 9, 3, 12, 30)
        prompts = [torch.randint(0, 400, (length,), generator=generator).tolist() for length in lengths]
        sampling = SamplingOptions(8, stop_ids(run.tokenizer))
        together = decode_in_batches(run.model, prompts, sampling, 4)
        alone = [generate(run.model, [Prompt(prompt)], sampling)[0].ids for prompt in prompts]
    assert together == alone
    assert len({tuple(row) for row in alone}) > 1


def test_whole_valid_split_is_measured(data: Path, run_directory: Path, monkeypatch) -> None:
    """Every conversation of the split, not the ``eval_iters`` batches of training."""
    seen = []
    original = valid_split.evaluate

    def counting(model, objective, batches):
        batches = list(batches)
        seen.extend(int((batch.document_id.amax(1) + 1).sum()) for batch in batches)
        return original(model, objective, batches)

    monkeypatch.setattr(valid_split, "evaluate", counting)
    with open_model(run_directory) as run:
        manifest = read_manifest(data / "dataset")
        valid_split.valid_losses(run, manifest)
        rows = manifest.splits["valid"].rows
    assert sum(seen) == rows > 0


def test_missing_run_and_damaged_checkpoint(data: Path, run_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model"):
        evaluate_model(tmp_path / "nowhere", options(data), progress=silent)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        evaluate_model(tmp_path, options(data), progress=silent)
    copy = tmp_path / "copy"
    shutil.copytree(run_directory, copy)
    (weights,) = sorted((copy / "checkpoints" / "iter_0000000").glob("*.distcp"))[:1]
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes"):
        evaluate_model(copy, options(data), progress=silent)


def test_dataset_of_another_vocabulary_is_refused(
    data: Path, run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many ids, but others: only the map's hash tells. Nor does a model annotate it; no weight is read."""
    monkeypatch.setattr(open_model_module, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    other = str(tmp_path / "dataset")
    vocabulary = ["--compact-vocab-size", "300", "--padded-vocab-size", "448", "--valid-fraction", "0.1"]
    build = ["--input-dir", str(data / "conversations"), "--output-dir", other, "--seq-len", "192", "--workers", "1"]
    assert main(["data", "build", *build, *vocabulary, "--quiet"]) == 0
    with pytest.raises(TokenizerError, match="the model has the vocabulary"):
        evaluate_model(run_directory, options(data, data_path=Path(other)), progress=silent)
    annotated = ["--reference", str(run_directory), "--output-dir", str(tmp_path / "annotated")]
    assert main(["data", "annotate", other, *annotated]) == 2
    assert "the model has the vocabulary" in capsys.readouterr().err and not (tmp_path / "annotated.partial").exists()


def test_distance_to_a_teacher_is_that_of_whole_distributions(data: Path, run_directory: Path, tmp_path: Path) -> None:
    """Against softmaxes written out, conversation by conversation, in fp64; to itself it is none."""
    from megatron_vpmoe.data.kd_dataset import KDDataset
    from megatron_vpmoe.model.attention.masks import SequenceLayout

    export_checkpoint(run_directory, tmp_path / "teacher")
    manifest = read_manifest(data / "dataset")
    few = options(data, per_family=1, max_new_tokens=2, data_path=data / "dataset")
    same, *_ = evaluate_model(run_directory, replace(few, teacher=tmp_path / "teacher"), progress=silent)
    assert same["to_teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    assert same["to_teacher"]["agreement"] > 0.9  # untrained: what is likeliest is a matter of rounding here and there
    teacher = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(teacher)
    generator = torch.Generator().manual_seed(0)
    save_file({name: x + 0.05 * torch.randn(x.shape, generator=generator) for name, x in tensors.items()}, teacher)
    with open_model(run_directory) as student, open_model(tmp_path / "teacher") as other:
        found = valid_split.distance(student, tmp_path / "teacher", manifest)
        sums, dataset = torch.zeros(3, dtype=torch.float64), KDDataset(manifest, "valid", seq_length=192)
        for number in range(len(dataset)):
            document = dataset[number]
            tokens = torch.from_numpy(document.tokens).long().unsqueeze(0)
            mask = torch.from_numpy(document.loss_mask).bool()
            layout = SequenceLayout(document_id=torch.zeros_like(tokens), position=torch.arange(tokens.shape[1])[None])
            with torch.no_grad():
                log_q, log_p = (
                    model.logits(model(tokens, layout).hidden_BSH)[0, mask].double().log_softmax(-1)
                    for model in (student.model, other.model)
                )
            sums += torch.stack(
                [(log_p.exp() * (log_p - log_q)).sum(), (log_p.argmax(-1) == log_q.argmax(-1)).sum(), mask.sum()]
            )
    assert found["kl"] == pytest.approx(float(sums[0] / sums[2]), rel=1e-4) and found["kl"] > 1e-3
    assert found["agreement"] == pytest.approx(float(sums[1] / sums[2]), abs=0.05)
    assert 0 < found["kl_top_64"] < found["kl"]
