"""When is a job done: its record against its inputs and outputs as they are now."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vpmoe.files import sha256_of_file
from vpmoe.commands import Command, CommandFailed
from vpmoe.quickstart.errors import QuickstartError
from vpmoe.quickstart.jobs import Beginning, Job, run_job, state_of

WRITE = (
    "import pathlib, sys; pathlib.Path('out').mkdir(exist_ok=True); pathlib.Path('out/made').write_text(sys.argv[1])"
)


class Workshop:
    """A job that writes ``out/made``, with inputs that a test changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs: dict[str, object] = {"options": 1, "source": "a"}
        self.text = "good"
        self.begun: list[Beginning] = []
        self.made = folder / "out" / "made"
        self.job = Job(
            step="data",
            name="things",
            folder=folder / "out",
            record=folder / "records" / "things.json",
            inputs=lambda: dict(self.inputs),
            outputs=self._outputs,
            commands=self._commands,
        )

    def run(self, *, force: bool = False) -> bool:
        """Whether it had to be run."""
        state = state_of(self.job, force=force)
        if not state.done:
            run_job(self.job, state, self.folder, say=lambda line: None)
        return not state.done

    def _outputs(self) -> dict | None:
        if not self.made.is_file() or self.made.read_text() == "damaged":
            return None
        return {"made": sha256_of_file(self.made)}

    def _commands(self, beginning: Beginning) -> list[Command]:
        self.begun.append(beginning)
        return [Command(("python", "-c", WRITE, self.text))]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_done_once_is_skipped(workshop: Workshop) -> None:
    assert workshop.run() and not workshop.run()
    assert workshop.begun == [Beginning.FRESH]


@pytest.mark.parametrize("key", ["options", "source"])
def test_changed_input_is_named_and_made_again(workshop: Workshop, key: str) -> None:
    workshop.run()
    workshop.inputs[key] = "changed"
    assert state_of(workshop.job).reason == f"changed since: {key}"
    assert workshop.run() and not workshop.run()
    assert workshop.begun[-1] is Beginning.REPLACE


def test_missing_outputs_are_made_again(workshop: Workshop) -> None:
    workshop.run()
    workshop.made.unlink()
    assert workshop.run() and workshop.begun[-1] is Beginning.FRESH


def test_damaged_outputs_are_made_again(workshop: Workshop) -> None:
    workshop.run()
    workshop.made.write_text("damaged")
    assert workshop.run() and workshop.begun[-1] is Beginning.REPLACE
    assert not workshop.run()


def test_what_others_made_is_not_replaced(workshop: Workshop) -> None:
    workshop.made.parent.mkdir()
    workshop.made.write_text("somebody's")
    with pytest.raises(QuickstartError, match="did not make"):
        workshop.run()
    assert workshop.made.read_text() == "somebody's"
    assert workshop.run(force=True) and workshop.made.read_text() == "good"


def test_what_others_changed_is_not_replaced(workshop: Workshop) -> None:
    workshop.run()
    workshop.made.write_text("somebody's")
    workshop.inputs["options"] = 2
    with pytest.raises(QuickstartError, match="did not make"):
        workshop.run()
    assert workshop.made.read_text() == "somebody's"


def test_outputs_beside_anything_are_made_again(workshop: Workshop) -> None:
    workshop.job = replace(workshop.job, folder=None)
    workshop.run()
    workshop.made.write_text("somebody's")
    assert workshop.run() and workshop.made.read_text() == "good"


def test_force(workshop: Workshop) -> None:
    workshop.run()
    assert workshop.run(force=True) and workshop.begun[-1] is Beginning.REPLACE


def test_failed_command_is_gone_on_with(workshop: Workshop) -> None:
    good = workshop.job.commands
    workshop.job = replace(workshop.job, commands=lambda beginning: [Command(("python", "-c", "raise SystemExit(7)"))])
    with pytest.raises(CommandFailed) as caught:
        workshop.run()
    assert caught.value.exit_code == 7
    spent = json.loads(workshop.job.record.read_text())["seconds"]
    workshop.job = replace(workshop.job, commands=good)
    (workshop.folder / "out").mkdir()
    (workshop.folder / "out" / "half").write_text("")
    assert workshop.run() and workshop.begun == [Beginning.CONTINUE]
    assert json.loads(workshop.job.record.read_text())["seconds"] > spent > 0


def test_interrupted_with_other_inputs_begins_anew(workshop: Workshop) -> None:
    good = workshop.job.commands
    workshop.job = replace(
        workshop.job, commands=lambda beginning: [Command(("python", "-c", WRITE + ";sys.exit(1)", "x"))]
    )
    with pytest.raises(CommandFailed):
        workshop.run()
    workshop.job = replace(workshop.job, commands=good)
    workshop.inputs["options"] = 2
    assert workshop.run() and workshop.begun == [Beginning.REPLACE]


def test_commands_that_end_well_but_make_too_little(workshop: Workshop) -> None:
    workshop.job = replace(workshop.job, complete=lambda outputs: workshop.text == "all")
    with pytest.raises(QuickstartError, match="not complete"):
        workshop.run()
    workshop.text = "all"
    assert workshop.run() and workshop.begun[-1] is Beginning.CONTINUE
    assert not workshop.run()


def test_edited_record_is_refused(workshop: Workshop) -> None:
    workshop.run()
    record = workshop.job.record
    record.write_text(record.read_text().replace('"options": 1', '"options": 2'))
    with pytest.raises(QuickstartError, match="edited"):
        workshop.run()
