"""CORE's numbers: item by item those of the plain reference, whatever the vocabulary, the batch or the context."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.model.attention.masks import left_padded
from megatron_vpmoe.model.builder import build_model
from ref.core_scoring import score_item
from tests.tiny import tiny_config
from tests.tiny_core_bundle import CORE, TASKS, WORDS, write_bundle
from tests.tiny_qwen3 import write_qwen3
from tests.tiny_student import write_student, write_vocabulary
from vpmoe.cli import main
from vpmoe.eval.open_model import open_model
from vpmoe.eval.suites.bundle import Bundle, Task, drawn, examples
from vpmoe.eval.suites.core8 import ask_all, score
from vpmoe.eval.suites.prompts import ask
from vpmoe.eval.suites.suite_report import centered
from vpmoe.tokenizer import CompactVocabulary, Tokenizer
from vpmoe.tokenizer.bpe import save_bpe, train_bpe
from vpmoe.tokenizer.hf_directory import HFDirectory
from vpmoe.tokenizer.o200k_harmony import load_o200k_harmony

TEXT = "Question: what is there? Answer: the red, green or blue signs and Sarah because they met and was"
SETTINGS = (
    'tasks = ["colors", "plain", "schemas", "last_word", "questions"]\nseed = 1337\nshot_seed = 1234\nbatch_size = 7\n'
)
SETTINGS += '[items]\nsmoke = 5\nfull = 10\n[bundle]\nurl = "http://localhost/b.zip"\nfolder = "nowhere"\nsha256 = "'


LEARNT = ["The cat that I saw was under the red house", 'Nobody there could read those "strange old" signs']
LEARNT += ["It was raining again, said Sarah", "They counted them twice and got 12 apples"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("core8")
    write_qwen3(folder / "qwen", vocab_size=384, max_position_embeddings=4096)
    save_bpe(train_bpe([TEXT, *WORDS] * 4, 330), folder / "qwen")
    assets = write_vocabulary(folder / "vocabulary", TEXT, 384)
    return {"qwen": folder / "qwen", "compact": write_student(folder / "student", assets=assets, padded_vocab_size=384)}


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "core8.toml"
    path.write_text(f'{SETTINGS}{"0" * 64}"\n')
    return path


def run(model: Path, bundle: Path, settings: Path, output: Path, *words: str) -> tuple[dict, list[dict]]:
    command = ["eval", "core8", str(model), "--bundle", str(bundle), "--config", str(settings), "--output", str(output)]
    assert main([*command, *words]) == 0
    lines = output.with_suffix(".items.jsonl").read_text().splitlines()
    return json.loads(output.read_text()), [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("context", [None, 40])
@pytest.mark.parametrize("kind", ["qwen", "compact"])
def test_item_by_item_as_the_reference(
    kind: str, context: int | None, models: dict[str, Path], bundle: Path, settings: Path, tmp_path: Path
) -> None:
    cut = [] if context is None else ["--context", str(context)]
    report, items = run(models[kind], bundle, settings, tmp_path / "r.json", "--size", "full", *cut)
    held = Bundle(bundle)
    with open_model(models[kind]) as opened, torch.no_grad():

        def logits_of(ids: list[int]) -> torch.Tensor:
            return opened.model(*left_padded([ids], opened.model.device)).logits()[0]

        told = iter(items)
        for name, (task_kind, shots, delimiter, chance) in TASKS.items():
            of_task = drawn(held.read(name), 10, 1337)
            assert [place for place, _ in of_task] != sorted(place for place, _ in of_task)
            right = 0
            for number, (place, item) in enumerate(of_task):
                one = next(told)
                expected = score_item(
                    task_kind,
                    item,
                    examples([each for _, each in of_task], number, shots, 1234),
                    delimiter or " ",
                    encode=lambda text: opened.tokenizer.encode_ordinary(text).tolist(),
                    first=opened.tokenizer.eod_id,
                    logits_of=logits_of,
                    context=context,
                )
                assert (one["task"], one["item"], one["gold"]) == (name, place, item.get("gold"))
                assert (one["chosen"], one["correct"]) == (expected["chosen"], expected["correct"])
                assert one["log_likelihoods"] == pytest.approx(expected["log_likelihoods"], abs=1e-4)
                right += one["correct"]
            entry = report["tasks"][name]
            assert (entry["n"], entry["accuracy"]) == (10, right / 10)
            assert entry["centered"] == pytest.approx((right / 10 - chance / 100) / (1 - chance / 100))
            assert entry["interval"][0] <= entry["accuracy"] <= entry["interval"][1]
            assert entry["cut"] == (0 if context is None else 10) or name != "colors"
    means = [entry["centered"] for entry in report["tasks"].values()]
    assert report["core8_centered_mean"] == pytest.approx(sum(means) / 5)


@pytest.mark.slow
def test_batch_and_selection_change_nothing(
    models: dict[str, Path], bundle: Path, settings: Path, tmp_path: Path
) -> None:
    whole, items = run(models["compact"], bundle, settings, tmp_path / "a.json", "--size", "all")
    assert whole["tasks"]["colors"]["n"] == 12 and whole["core8_centered_mean"] == whole["centered_mean"]
    some, fewer = run(
        models["compact"],
        bundle,
        settings,
        tmp_path / "b.json",
        "--size",
        "all",
        "--batch-size",
        "1",
        "--tasks",
        "plain,schemas",
    )
    assert some["core8_centered_mean"] is None and some["tasks"].keys() == {"plain", "schemas"}
    same = [one for one in items if one["task"] in ("plain", "schemas")]
    for one, other in zip(fewer, same, strict=True):
        assert one.pop("log_likelihoods") == pytest.approx(other.pop("log_likelihoods"), abs=1e-5)
        assert one == other


@pytest.mark.slow
def test_all_22_tasks_of_core_and_its_mean(models: dict[str, Path], settings: Path, tmp_path: Path) -> None:
    """With as many items as examples and one: the mean is of all, the settings' own stays empty."""
    bundle = write_bundle(tmp_path / "core", 11, tasks=CORE)
    report, items = run(models["compact"], bundle, settings, tmp_path / "r.json", "--tasks", "all", "--size", "all")
    assert list(report["tasks"]) == list(CORE) and len(CORE) == 22 and len(items) == 22 * 11
    for name, (kind, shots, _, chance) in CORE.items():
        entry = report["tasks"][name]
        assert (entry["kind"], entry["shots"], entry["chance"]) == (kind, shots, chance / 100)
        assert entry["centered"] == pytest.approx((entry["accuracy"] - chance / 100) / (1 - chance / 100))
    mean = sum(entry["centered"] for entry in report["tasks"].values()) / 22
    assert report["centered_mean"] == pytest.approx(mean) and report["core8_centered_mean"] is None
    assert report["bundle"]["jeopardy"].items() >= {"shots": 10, "delimiter": "\nAnswer: ", "chance": 0.0}.items()


def test_published_accuracies_give_the_published_mean() -> None:
    """Those of Qwen3-0.6B with 50 items, as docs/eval_suite.md quotes them."""
    published = {"arc_easy": 0.64, "arc_challenge": 0.42, "hellaswag": 0.40, "lambada_openai": 0.0}
    published |= {"boolq": 0.78, "commonsense_qa": 0.66, "piqa": 0.72, "winogrande": 0.60}
    mean = sum(centered(share, CORE[name][3] / 100) for name, share in published.items()) / 8
    assert mean == pytest.approx(0.3228, abs=5e-5)


@pytest.mark.slow
def test_of_one_item_a_task_the_mean_has_no_interval(models: dict[str, Path], settings: Path, tmp_path: Path) -> None:
    bundle, output = write_bundle(tmp_path / "one", 1), tmp_path / "r.json"
    report, _ = run(models["compact"], bundle, settings, output)
    assert report["means"]["centered_mean"]["interval"] is None and report["tasks"]["plain"]["interval"][1] > 0.5
    assert main(["eval", "report", str(output)]) == 0


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder, full = tmp_path_factory.mktemp("vocabularies"), load_o200k_harmony()
    save_bpe(train_bpe([TEXT, *WORDS, *LEARNT] * 4, 400), folder)
    counts = np.bincount(full.encode_ordinary(TEXT), minlength=full.vocab_size)
    return {"compact": CompactVocabulary.from_counts(full, counts), "qwen": HFDirectory(folder), "o200k": full}


@pytest.mark.parametrize("kind", ["o200k", "qwen", "compact"])
@pytest.mark.parametrize("ending", ["", " ", "\n", '"'])
def test_a_blank_belongs_to_the_answer(kind: str, ending: str, vocabularies: dict[str, Tokenizer]) -> None:
    """Where lambada goes wrong: an answer is `` signs`` and stands behind the last word, not behind a blank."""
    tokenizer = vocabularies[kind]
    task = Task(label="l", dataset_uri="-", icl_task_type="language_modeling", num_fewshot=[0])
    item = {"context": f"I do not care about{ending}", "continuation": "signs"}
    asked = ask(task, item, [], tokenizer, None)
    (request,) = asked.requests
    quote = ending.strip()
    assert request.context[0] == tokenizer.eod_id and asked.gold is None
    assert tokenizer.decode(request.context[1:]) == f"I do not care about{quote}"
    assert tokenizer.decode(request.given) == " signs" and request.scored == len(request.given)
    assert [*request.context[1:], *request.given] == tokenizer.encode_ordinary(
        f"I do not care about{quote} signs"
    ).tolist()
    choice = Task(
        label="m",
        dataset_uri="-",
        icl_task_type="multiple_choice",
        num_fewshot=[0],
        continuation_delimiter="\nAnswer: ",
    )
    requests = ask(choice, {"query": "Which?", "choices": ["yes", "no"], "gold": 1}, [], tokenizer, None).requests
    assert [tokenizer.decode(one.given).strip() for one in requests] == ["yes", "no"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["o200k", "qwen", "compact"])
def test_a_model_that_knows_the_last_words_reads_1(
    kind: str, vocabularies: dict[str, Tokenizer], single_process: None
) -> None:
    """Trained on four sentences until it knows them, it completes each, and nothing else."""
    tokenizer = vocabularies[kind]
    torch.manual_seed(1)
    model = build_model(tiny_config(padded_vocab_size=tokenizer.padded_vocab_size))
    rows = [[tokenizer.eod_id, *tokenizer.encode_ordinary(text).tolist()] for text in LEARNT]
    ids, layout = left_padded(rows, model.device)
    scored = (layout.document_id >= 0) & (ids != tokenizer.eod_id)  # how a text begins nobody can know
    scored[:, -1] = False
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss, _ = model(ids, layout).cross_entropy(ids.roll(-1, 1), scored, torch.ones(ids.shape) / scored.sum())
        loss.backward()
        optimizer.step()
        if loss < 0.15:
            break
    task = Task(label="l", dataset_uri="-", icl_task_type="language_modeling", num_fewshot=[0])
    known = [dict(zip(("context", "continuation"), text.rsplit(" ", 1), strict=True)) for text in LEARNT]
    others = [{**item, "continuation": "elephants"} for item in known]
    asked = ask_all(task, [*known, *others], tokenizer, None, 0)
    records = score(model, asked, 3, "last words")
    assert [record["correct"] for record in records] == [True] * 4 + [False] * 4


@pytest.mark.slow
def test_what_is_missing_or_there_already_is_told(
    models: dict[str, Path], bundle: Path, settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["eval", "core8", str(models["compact"]), "--config", str(settings), "--output", str(tmp_path / "r.json")]
    partial = write_bundle(tmp_path / "partial", without="plain")
    for words, told in (
        (["--bundle", str(tmp_path / "none")], "no CORE bundle"),
        (["--bundle", str(partial)], "the items of plain are not in this bundle"),
        (["--bundle", str(bundle), "--tasks", "colors,tastes"], "there is no task 'tastes'"),
        (["--bundle", str(bundle), "--size", "huge"], "there is no size 'huge'"),
    ):
        assert main([*command, *words]) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "r.json").exists()
    short = ["--bundle", str(partial), "--tasks", "last_word"]
    assert main([*command, *short]) == 0
    assert main([*command, *short]) == 2 and "finished report" in capsys.readouterr().err
    assert main([*command, *short, "--overwrite"]) == 0
    (tmp_path / "r.json").write_text("{}")
    assert main([*command, *short, "--overwrite"]) == 2 and "does not say it was made by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "line", "told"),
    [
        ("plain", '{"query": "?", "choices": ["a"], "gold": 0}', "no texts to choose among"),
        ("plain", '{"query": "?", "choices": ["a", "b"], "gold": 2}', "gold is 2 of 2 options"),
        ("schemas", '{"context_options": ["a", "b"], "gold": 0}', "no text in continuation"),
        ("last_word", '{"context": "a", "continuation": " "}', "continuation is empty"),
        ("last_word", "[]", "no text in context, continuation"),
    ],
)
def test_an_item_of_another_form_is_named(name: str, line: str, told: str, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path)
    with (folder / "eval_data" / "some" / f"{name}.jsonl").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=told) as error:
        Bundle(folder).read(name)
    assert f"{name}.jsonl:13" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("label: plain", "label: colors", "two tasks are called colors"),
        ("  - 3", "  - -3", "the task 'colors' cannot be read: num_fewshot"),
        ("icl_task_type: schema", "icl_task_type: other", "the task 'schemas' cannot be read: icl_task_type"),
        ("icl_tasks:", "icl_tasks: []\nothers:", "there is no list of tasks"),
    ],
)
def test_a_task_of_another_form_is_named(old: str, new: str, told: str, tmp_path: Path) -> None:
    path = write_bundle(tmp_path) / "core.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=told) as error:
        Bundle(tmp_path)
    assert "core.yaml" in str(error.value) and "--bundle" in str(error.value)


@pytest.mark.slow
def test_the_shared_bundle_is_read_whole(repository: Path) -> None:
    folder = repository.parent / "shared" / "data" / "eval_bundle"
    if not folder.is_dir():
        pytest.skip(f"no bundle at {folder}")
    bundle = Bundle(folder)
    assert len(bundle.tasks) == 8 and bundle.tasks["boolq"].chance == 0.62
    counts = {name: len(bundle.read(name)) for name in bundle.tasks if name != "hellaswag"}
    assert counts["lambada_openai"] == 5153 and counts["winogrande"] == 1267
    with pytest.raises(DataError, match="items of hellaswag are not in this bundle"):
        bundle.read("hellaswag")
