"""Stories by a served model: held to the checker, paid for once, and never silently by the templates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in_endpoint import Endpoint, Messages, right_story, serving_chat
from vpmoe.cli import main
from vpmoe.data_curation.tasks.stories import endpoint as module
from vpmoe.data_curation.tasks.stories.checker import StoryCheck, check_story
from vpmoe.data_curation.tasks.stories.endpoint import KEY_VARIABLE, Answers, Settings
from vpmoe.data_curation.tasks.stories.instructions import DROPPED, answers_of, generate
from vpmoe.data_curation.tasks.stories.prompts import make_prompt
from vpmoe.data_curation.tasks.stories.writing import Writing
from vpmoe.errors import DataError, EndpointError

QUICK = Settings("", "stand-in", concurrency=4, timeout=60.0, attempts=3, first_wait=0.01)
IMPATIENT = replace(QUICK, timeout=0.8)
ROWS = 8


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def served() -> Iterator[Endpoint]:
    with serving_chat(Endpoint()) as endpoint:
        yield endpoint


def written(served: Endpoint, output: Path, writing: Writing | None = None, **more: Any) -> dict[str, Any]:
    writing = writing or Writing(QUICK)
    writing = replace(writing, endpoint=replace(writing.endpoint, url=served.address))
    return generate(output, **{"rows": ROWS, "seed": 1, "writing": writing, **more})


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for split in ("train", "valid", "test") for line in (output / f"{split}.jsonl").open()]
    return sorted(rows, key=lambda row: row["id"])


def test_the_model_writes_what_the_prompts_ask(served: Endpoint, tmp_path: Path) -> None:
    served.delay = 0.1  # so that they wait for it together, however busy the machine
    report = written(served, tmp_path / "rows")
    assert report["written"]["requests"] == len(served.asked) == ROWS and sum(report["rows"].values()) == ROWS
    assert report["written"]["completion_tokens"] == 3 * ROWS and report["written"]["dropped"] == {}
    assert served.paths == {"/v1/chat/completions"} and 1 < served.at_once <= QUICK.concurrency
    for index, row in enumerate(rows_of(tmp_path / "rows")):
        assert check_story(row["completion"], row["constraints"]).passed
        assert {**row, "completion": ""} == {**make_prompt(1, index), "completion": ""}
        assert row["completion"] != make_prompt(1, index)["completion"]
    # Done and valid: nobody is asked again, wherever the model has moved to.
    assert written(Endpoint(), tmp_path / "rows") == report and len(served.asked) == ROWS


def test_both_sides_of_a_pair_are_written(served: Endpoint, tmp_path: Path) -> None:
    report = written(served, tmp_path / "rows", pairs=True)
    assert report["written"]["requests"] == 2 * ROWS
    for row in rows_of(tmp_path / "rows"):
        assert check_story(row["chosen"], row["constraints"]).passed
        assert check_story(row["rejected"], row["constraints"]) == StoryCheck(True, (), False, ())


def test_a_story_that_fails_is_asked_for_again_and_told_why(served: Endpoint, tmp_path: Path) -> None:
    def says(messages: Messages) -> str:
        story = right_story(messages[0]["content"])
        return story if len(messages) == 5 else "Too short." if len(messages) == 1 else story.replace("the ", "X")

    served.says = says
    report = written(served, tmp_path / "rows")
    assert report["written"]["requests"] == 3 * ROWS and report["written"]["dropped"] == {}
    last = max(served.asked, key=len)
    assert "it has 2 words" in last[2]["content"] and "it lacks" in last[4]["content"]
    assert last[1] == {"role": "assistant", "content": "Too short."}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda story, request: "word " * 70, "required"),
        (lambda story, request: f"{story} {request.split('in any form: ')[1].split(',')[0].split('.')[0]}", "banned"),
        (lambda story, request: "Zorro was a bear called Zorro. " + story, "protagonist"),
        (lambda story, request: story * 3, "length"),
        (lambda story, request: "", "no_text"),
        (lambda story, request: story + "\0", "no_text"),
    ],
)
def test_a_row_without_a_right_story_is_dropped_and_counted(
    served: Endpoint, tmp_path: Path, spoil: Any, reason: str
) -> None:
    wrong = {make_prompt(1, index)["constraints"]["protagonist"]["name"] for index in (2, 5)}

    def says(messages: Messages) -> str:
        request = messages[0]["content"]
        story = right_story(request)
        return spoil(story, request) if any(f"hero is {name}," in request for name in wrong) else story

    served.says = says
    report = written(served, tmp_path / "rows", Writing(QUICK, tries=2))
    dropped = json.loads((tmp_path / "rows" / DROPPED).read_text())
    assert report["written"]["dropped"] == {reason: len(dropped)} and {2, 5} <= {entry["row"] for entry in dropped}
    assert sum(report["rows"].values()) == ROWS - len(dropped) == len(rows_of(tmp_path / "rows"))
    assert report["written"]["requests"] == ROWS + len(dropped)


def test_a_model_that_never_does_it_right_leaves_no_rows(served: Endpoint, tmp_path: Path) -> None:
    served.says = lambda messages: "I cannot write stories."
    with pytest.raises(DataError, match=r"none of 8 rows .*\{'length': 8\}"):
        written(served, tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


def test_the_judge_is_asked_and_counted(served: Endpoint, tmp_path: Path) -> None:
    def says(messages: Messages) -> str:
        said = messages[-1]["content"]
        if not said.startswith("Is this story about "):
            return right_story(messages[0]["content"])
        theme = said.split()[4].strip("?")
        return {"courage": "NO, it is not.", "sharing": "Perhaps."}.get(theme, "yes")

    served.says = says
    report = written(served, tmp_path / "rows", Writing(QUICK, tries=1, judge=True), rows=40)["written"]
    themes = [make_prompt(1, index)["constraints"]["theme"] for index in range(40)]
    assert report["judged"] == {
        "yes": 40 - themes.count("courage") - themes.count("sharing"),
        "no": themes.count("courage"),
        "unclear": themes.count("sharing"),
    }
    assert report["dropped"] == {"theme": report["judged"]["no"] + report["judged"]["unclear"]}
    assert {row["constraints"]["theme"] for row in rows_of(tmp_path / "rows")}.isdisjoint({"courage", "sharing"})


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "drop", "garbage", "endless"])
def test_what_may_pass_is_tried_again(served: Endpoint, tmp_path: Path, fault: int | str) -> None:
    served.faults = {3: fault, 6: fault}
    report = written(served, tmp_path / "rows")["written"]
    assert report["requests"] == ROWS + 2 and report["dropped"] == {}


@pytest.mark.slow
def test_what_takes_too_long_is_tried_again(served: Endpoint, tmp_path: Path) -> None:
    served.faults = {3: "slow"}
    report = written(served, tmp_path / "rows", Writing(IMPATIENT))["written"]
    assert report["requests"] > ROWS and report["dropped"] == {}  # a busy machine may take too long once more


@pytest.mark.parametrize("fault", ["null", "empty", "length", "content_filter"])
def test_an_answer_of_nothing_or_of_a_part_is_asked_for_again(served: Endpoint, tmp_path: Path, fault: str) -> None:
    served.faults = {3: fault}
    assert written(served, tmp_path / "rows")["written"]["requests"] == ROWS + 1
    assert all(len(messages) == 1 for messages in served.asked)


@pytest.mark.parametrize(
    ("fault", "reason", "named"),
    [
        (401, "unauthorized", KEY_VARIABLE),
        (403, "unauthorized", KEY_VARIABLE),
        (404, "not_found", "--writer-model"),
        (400, "refused", "out of order"),
        (302, "refused", "302"),
        (500, "unreachable", "3 attempts"),
        pytest.param("slow", "timeout", "within 0.8 s", marks=pytest.mark.slow),
        ("drop", "unreachable", "3 attempts"),
        ("garbage", "unusable", "no chat completion"),
    ],
)
def test_a_fault_that_stays_ends_it_and_costs_nothing_of_what_came(
    served: Endpoint, tmp_path: Path, fault: int | str, reason: str, named: str
) -> None:
    served.faults = dict.fromkeys(range(5, 200), fault)
    one_by_one = Writing(replace(IMPATIENT if fault == "slow" else QUICK, concurrency=1))
    with pytest.raises(EndpointError, match=named) as caught:
        written(served, tmp_path / "rows", one_by_one)
    assert caught.value.reason == reason and not (tmp_path / "rows").exists()
    if reason in ("unauthorized", "not_found", "refused"):
        assert len(served.asked) == 6, "what does not pass is not tried again"
    assert len(Answers(answers_of(tmp_path / "rows"))._known) == 5
    served.faults.clear()
    before = len(served.asked)
    report = written(served, tmp_path / "rows")["written"]
    assert report["answers_kept_before"] == 5 and len(served.asked) - before == report["requests"] == ROWS - 5


def test_a_kill_in_a_line_costs_that_line_and_more_rows_cost_the_rest_alone(served: Endpoint, tmp_path: Path) -> None:
    written(served, tmp_path / "rows")
    kept = answers_of(tmp_path / "rows")
    kept.write_bytes(kept.read_bytes()[:-10])
    report = written(served, tmp_path / "rows", rows=ROWS + 3, overwrite=True)
    assert report["written"]["answers_kept_before"] == ROWS - 1 and report["written"]["requests"] == 4
    assert kept.read_bytes().count(b"\n") == ROWS + 3
    kept.write_text('{"request": 3}\n')
    with pytest.raises(DataError, match="no answer that was kept"):
        Answers(kept)
    for theirs in ("no line of ours", '{"request": "a", "answer": "b"}\nno line of ours'):
        kept.write_text(theirs)
        with pytest.raises(DataError, match="none that a kill left of ours"):
            Answers(kept)
        assert kept.read_text() == theirs


@pytest.mark.parametrize("date", [False, True])
def test_it_waits_as_long_as_it_is_asked_to(
    served: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, date: bool
) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    monkeypatch.setattr(module.time, "time", lambda: 1_000_000.0)
    served.faults, served.headers = {0: 429}, {"Retry-After": formatdate(1_000_030.0) if date else "30"}
    written(served, tmp_path / "rows", rows=1)
    assert waited == [30.0]
    served.faults = {2: 429}
    served.headers = {"Retry-After": formatdate(1_003_600.0) if date else "3600"}
    with pytest.raises(EndpointError, match="in 3600 s") as caught:
        written(served, tmp_path / "other", rows=1)
    assert caught.value.reason == "rate_limited" and waited == [30.0]


@pytest.mark.parametrize("header", [None, "", "soon", "nan", "inf", "Mon, 99 Foo"])
def test_a_wait_that_is_none(header: str | None) -> None:
    assert module._wait_asked_for(header) is None
    assert module._wait_asked_for("-3") == 0


def test_the_key_is_sent_and_kept_nowhere(
    served: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served.key = "sk-right-key"
    monkeypatch.setenv(KEY_VARIABLE, "sk-wrong-key")
    command = ["data", "story-prompts", "--output-dir", str(tmp_path / "rows"), "--rows", "3", "--quiet"]
    command += ["--writer", served.address + "/v1/", "--writer-model", "stand-in"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert KEY_VARIABLE in told and "wrong key: Bearer ***" in told and "sk-wrong-key" not in told
    monkeypatch.setenv(KEY_VARIABLE, " sk-right-key\n")
    assert main(command) == 0
    assert "requests: 3" in capsys.readouterr().out and served.paths == {"/v1/chat/completions"}
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"right-key" not in path.read_bytes()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--writer", "http://127.0.0.1:1"], "--writer-model"),
        (["--judge", "--writer-tries", "4"], "--writer-tries, --judge"),
        (["--writer-model", "x"], "--writer"),
        (["--writer", "ftp://host", "--writer-model", "x"], "http or https"),
        (["--writer", "http://me:secret@host", "--writer-model", "x"], KEY_VARIABLE),
        (["--writer", "http://host:port", "--writer-model", "x"], "no address"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    tmp_path: Path, words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "story-prompts", "--output-dir", str(tmp_path / "out"), *words]) == 2
    told = capsys.readouterr().err
    assert named in told and "secret" not in told and not (tmp_path / "out").exists()


def test_a_key_that_no_header_holds_is_named_and_not_shown(
    served: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sé\ncret")
    with pytest.raises(EndpointError, match=KEY_VARIABLE) as caught:
        written(served, tmp_path / "rows")
    assert "cret" not in str(caught.value)
