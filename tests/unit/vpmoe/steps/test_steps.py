"""What a keyed step promises: due for a named reason, gone on with, whole or not at all, and nothing of others lost."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe import files
from megatron_vpmoe.errors import BusyError, DataError, NotOursError
from vpmoe import steps
from vpmoe.steps import RECEIPT, Step, Work


class Killed(BaseException):
    """Ends a step as a kill would, at a place of our choice."""


def killed() -> dict[str, Any]:
    raise Killed


def step_at(folder: Path, **changed: Any) -> Step:
    fields: dict[str, Any] = {"kind": "numbers", "version": 1, "output": folder, "decides": {"up_to": 3}}
    return Step(**fields | changed)


def write_numbers(work: Work) -> dict[str, Any]:
    for number in range(work.key["up_to"]):
        (work.folder / f"{number}.txt").write_text(str(number))
    work.once("draft", lambda: (work.scratch / "draft").write_text("three"))
    (work.scratch / "draft").read_text()  # what is done once is there until the step is finished
    return {"told": work.key["up_to"]}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_done_once_and_told_from_the_receipt(tmp_path: Path) -> None:
    step = step_at(tmp_path / "out")
    assert step.state().due == "not made yet"
    first = steps.run(step, write_numbers)
    assert names(step.output) == {"0.txt", "1.txt", "2.txt", RECEIPT}
    assert first["report"] == {"told": 3}
    assert step.state(check_hashes=True).due is None
    assert steps.run(step, lambda work: pytest.fail("made twice")) == first


def test_below_a_file_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"no folder, so nothing can be made below it(.|\n)*file\n"):
        steps.run(step_at(tmp_path / "file" / "below"), write_numbers)


def test_due_names_the_field(tmp_path: Path) -> None:
    steps.run(step_at(tmp_path / "out"), write_numbers)
    assert "up_to: 3 -> 4" in str(step_at(tmp_path / "out", decides={"up_to": 4}).state().due)
    assert "version: 1 -> 2" in str(step_at(tmp_path / "out", version=2).state().due)
    assert "packages.numpy: absent -> " in str(step_at(tmp_path / "out", packages=("numpy",)).state().due)


def test_the_code_version_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps.run(step_at(tmp_path / "out"), write_numbers)
    monkeypatch.setattr("vpmoe.steps.step.__version__", "9.9")
    assert "code: " in str(step_at(tmp_path / "out").state().due)


def test_finished_work_wants_to_be_asked_for_and_stays_until_its_successor_is_whole(tmp_path: Path) -> None:
    former, step = step_at(tmp_path / "out"), step_at(tmp_path / "out", decides={"up_to": 1})
    steps.run(former, write_numbers)
    with pytest.raises(NotOursError, match=r"up_to: 3 -> 1(.|\n)*--overwrite"):
        steps.run(step, write_numbers)

    def fails(work: Work) -> dict[str, Any]:
        write_numbers(work)
        raise ValueError

    with pytest.raises(ValueError):
        steps.run(step, fails, overwrite=True)
    assert former.state(check_hashes=True).due is None
    said: list[str] = []
    steps.run(step, write_numbers, overwrite=True, say=said.append)
    assert any("replacing" in line and "3 files" in line for line in said)
    assert names(step.output) == {"0.txt", RECEIPT}
    assert names(tmp_path) == {"out", ".out.lock"}


def put_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")


def put_foreign_file_into_finished_work(folder: Path) -> None:
    steps.run(step_at(folder, decides={"up_to": 1}), write_numbers)
    (folder / "thesis.txt").write_text("mine")


def put_finished_work_of_another_kind(folder: Path) -> None:
    steps.run(step_at(folder, kind="letters"), write_numbers)


def put_work_with_a_cut_receipt(folder: Path) -> None:
    steps.run(step_at(folder, decides={"up_to": 1}), write_numbers)
    (folder / RECEIPT).write_bytes((folder / RECEIPT).read_bytes()[:40])


def put_work_with_an_edited_receipt(folder: Path) -> None:
    steps.run(step_at(folder, decides={"up_to": 1}), write_numbers)
    text = (folder / RECEIPT).read_text()
    (folder / RECEIPT).write_text(text.replace('"up_to": 1', '"up_to": 2'))


def put_a_receipt_of_a_list(folder: Path) -> None:
    put_file(folder)
    (folder / RECEIPT).write_text("[]")


def put_a_partial_folder(folder: Path) -> None:
    put_file(folder.with_name("out.partial"))


def put_edited_unfinished_work(folder: Path) -> None:
    """Of the very step that will be asked for: what it says is done decides what is left out."""
    with contextlib.suppress(Killed):
        steps.run(step_at(folder), lambda work: work.once("first", lambda: {"rows": 1}) and killed())
    marker = folder.with_name("out.partial") / "unfinished.json"
    marker.write_text(marker.read_text().replace('"rows": 1', '"rows": 2'))


def put_unfinished_work_of_the_wrong_shape(folder: Path) -> None:
    put_edited_unfinished_work(folder)
    marker = folder.with_name("out.partial") / "unfinished.json"
    marker.write_text(json.dumps({"key": json.loads(marker.read_text())["key"]}))


def put_a_link(folder: Path) -> None:
    put_file(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "put",
    [
        put_file,
        put_foreign_file_into_finished_work,
        put_finished_work_of_another_kind,
        put_work_with_a_cut_receipt,
        put_work_with_an_edited_receipt,
        put_a_receipt_of_a_list,
        put_a_partial_folder,
        put_edited_unfinished_work,
        put_unfinished_work_of_the_wrong_shape,
        put_a_link,
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_it_did_not_make_is_never_removed(put: Callable[[Path], None], overwrite: bool, tmp_path: Path) -> None:
    put(tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".out.lock"}
    with pytest.raises(NotOursError):
        steps.run(step_at(tmp_path / "out"), write_numbers, overwrite=overwrite)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".out.lock"}
    assert after == before


def test_an_empty_folder_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    steps.run(step_at(tmp_path / "out"), write_numbers)
    assert (tmp_path / "out" / RECEIPT).is_file()


def test_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    step, made = step_at(tmp_path / "out"), []

    def make(work: Work) -> dict[str, Any]:
        work.once("first", lambda: made.append("first"))
        if not work.resumed:
            raise KeyboardInterrupt
        work.once("second", lambda: made.append("second"))
        return {}

    with pytest.raises(KeyboardInterrupt):
        steps.run(step, make)
    assert step.state().due == "it was interrupted"
    steps.run(step, make)
    assert made == ["first", "second"]


def test_what_a_kill_left_of_a_file_being_written_is_not_part_of_the_result(tmp_path: Path) -> None:
    def killed(work: Work) -> dict[str, Any]:
        (work.folder / "valid").mkdir()
        for place in (work.folder, work.folder / "valid"):
            (place / f".numbers.json.{4242}.tmp").write_text("{")
        raise Killed

    with pytest.raises(Killed):
        steps.run(step_at(tmp_path / "out"), killed)
    receipt = steps.run(step_at(tmp_path / "out"), write_numbers)
    assert set(receipt["files"]) == {"0.txt", "1.txt", "2.txt"}
    assert not list((tmp_path / "out").rglob(".*"))


def test_unfinished_work_of_another_key_is_kept_unless_asked(tmp_path: Path) -> None:
    def interrupted(work: Work) -> dict[str, Any]:
        (work.folder / "days of work").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.run(step_at(tmp_path / "out"), interrupted)
    other = step_at(tmp_path / "out", decides={"up_to": 2})
    with pytest.raises(NotOursError, match="up_to: 3 -> 2"):
        steps.run(other, write_numbers)
    assert (tmp_path / "out.partial" / "days of work").exists()
    steps.run(other, write_numbers, overwrite=True)
    assert names(tmp_path / "out") == {"0.txt", "1.txt", RECEIPT}


@pytest.mark.parametrize(
    ("given", "output"), [("a", "a/b"), ("a/b", "a"), ("a", "a"), ("a/../c", "c/d")], ids=lambda text: text
)
def test_input_and_output_do_not_contain_one_another(given: str, output: str, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="in one another"):
        steps.run(step_at(tmp_path / output, inputs=(tmp_path / given,)), write_numbers, overwrite=True)


def test_a_second_process_is_refused_with_the_owner(tmp_path: Path) -> None:
    step = step_at(tmp_path / "out")
    program = (
        "import sys; from pathlib import Path; from vpmoe import steps\n"
        f"step = steps.Step('numbers', 1, Path({str(step.output)!r}), {{'up_to': 3}})\n"
        "def make(work):\n    print('at work', flush=True)\n    sys.stdin.read()\n    return {}\n"
        "steps.run(step, make)"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(BusyError, match=f"process {other.pid} on "):
            steps.run(step, write_numbers)
    finally:
        other.kill()
        other.wait()
    said: list[str] = []
    steps.run(step, write_numbers, say=said.append)  # the dead owner is no hindrance
    assert f"process {other.pid}" in said[0]


def test_a_full_disk_is_one_message_and_loses_nothing(tmp_path: Path) -> None:
    def full(work: Work) -> dict[str, Any]:
        write_numbers(work)
        raise OSError(28, "No space left on device", str(work.folder / "2.txt"))

    with pytest.raises(DataError, match="No space left") as caught:
        steps.run(step_at(tmp_path / "out"), full)
    assert "goes on" in str(caught.value)
    assert (tmp_path / "out.partial" / "1.txt").exists()


def test_in_place_work_is_gone_on_with_and_replaced_only_when_asked(tmp_path: Path) -> None:
    step = step_at(tmp_path / "run", in_place=True)

    def interrupted(work: Work) -> dict[str, Any]:
        assert work.folder == step.output
        (work.folder / "checkpoint").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.run(step, interrupted)
    steps.run(step, write_numbers)
    assert {"checkpoint", "0.txt"} <= names(step.output)
    (step.output / "2.txt").unlink()
    steps.run(step, write_numbers)  # same key, a file lost: gone on with
    assert {"checkpoint", "2.txt"} <= names(step.output)
    other = step_at(tmp_path / "run", in_place=True, decides={"up_to": 1})
    with pytest.raises(NotOursError):
        steps.run(other, write_numbers)
    steps.run(other, write_numbers, overwrite=True)
    assert names(step.output) == {"0.txt", RECEIPT}


@pytest.mark.slow
def test_killed_at_any_write_it_ends_the_same_and_old_or_new_is_always_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every removal, rename and write of the engine is a place to die."""
    calls = {"left": -1}

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            calls["left"] -= 1
            if calls["left"] == 0:
                raise Killed
            return function(*arguments, **options)

        return called

    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    monkeypatch.setattr(Path, "mkdir", dying(Path.mkdir))
    monkeypatch.setattr(Path, "rmdir", dying(Path.rmdir))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))
    monkeypatch.setattr("megatron_vpmoe.files.write_atomically", dying(files.write_atomically))
    ended = False
    for place in range(1, 60):
        folder = tmp_path / f"case{place}" / "out"
        old, new = step_at(folder, decides={"up_to": 2}), step_at(folder, decides={"up_to": 4})
        calls["left"] = -1
        steps.run(old, write_numbers)
        calls["left"] = place
        try:
            steps.run(new, write_numbers, overwrite=True)
            ended = True
        except Killed:
            pass
        calls["left"] = -1
        whole = [path for path in (folder, folder.with_name(".out.replaced")) if (path / RECEIPT).is_file()]
        assert any(set(json.loads((path / RECEIPT).read_text())["files"]) <= names(path) for path in whole), place
        steps.run(new, write_numbers, overwrite=True)
        assert names(folder) == {"0.txt", "1.txt", "2.txt", "3.txt", RECEIPT}
        assert names(folder.parent) == {"out", ".out.lock"}
        if ended:
            break
    assert ended, "the engine writes more often than the test dies"


@pytest.mark.parametrize("in_place", [False, True])
def test_discarding_what_the_step_made_whatever_its_key(tmp_path: Path, in_place: bool) -> None:
    step, other = (step_at(tmp_path / "out", in_place=in_place, decides={"up_to": n}) for n in (3, 4))
    steps.discard(step)  # nothing is there
    steps.run(step, write_numbers)
    steps.discard(other)
    assert not step.output.exists()

    def stop(work: Work) -> dict[str, Any]:
        (work.folder / "half").write_text("")
        raise Killed

    with pytest.raises(Killed):
        steps.run(step, stop)
    steps.discard(other)
    assert not step.partial.exists() and steps.run(other, write_numbers)["report"] == {"told": 4}


def test_discarding_leaves_what_others_made(tmp_path: Path) -> None:
    step = step_at(tmp_path / "out")
    steps.run(step, write_numbers)
    with pytest.raises(NotOursError, match="'numbers'"):
        steps.discard(step_at(tmp_path / "out", kind="letters"))
    (step.output / "notes.md").write_text("mine")
    with pytest.raises(NotOursError, match=r"notes\.md"):
        steps.discard(step)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.md").write_text("mine")
    with pytest.raises(NotOursError, match="no receipt"):
        steps.discard(step_at(tmp_path / "bare", in_place=True))
    assert (tmp_path / "bare" / "notes.md").is_file() and (step.output / "0.txt").is_file()


def test_a_fresh_folder_holds_nothing_of_an_interrupted_attempt(tmp_path: Path) -> None:
    step = step_at(tmp_path / "out")

    def stops(work: Work) -> dict[str, Any]:
        (work.fresh("part") / "half.txt").write_text("hal")
        raise Killed

    with pytest.raises(Killed):
        steps.run(step, stops)

    def ends(work: Work) -> dict[str, Any]:
        assert work.resumed and (work.folder / "part" / "half.txt").is_file()
        assert names(work.fresh("part")) == set()
        return {}

    assert steps.run(step, ends)["files"] == {}


def test_an_attempt_that_made_nothing_is_in_nobodys_way(tmp_path: Path) -> None:
    """A wrong setting is found out at once: to mend it is not to discard work."""

    def fails(_work: Work) -> dict[str, Any]:
        raise ValueError

    with pytest.raises(ValueError):
        steps.run(step_at(tmp_path / "out"), fails)
    steps.run(step_at(tmp_path / "out", decides={"up_to": 1}), write_numbers)
    assert names(tmp_path / "out") == {"0.txt", RECEIPT}
