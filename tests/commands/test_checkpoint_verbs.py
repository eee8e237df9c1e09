"""``vpmoe checkpoint``: what is told of a run, an export and a damaged checkpoint; each damage; each difference."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from megatron_vpmoe.config import parameter_count
from megatron_vpmoe.manifest import read_manifest
from tests.any_json import changed_json
from tests.fixtures_dataset import small_dataset
from tests.tiny import tiny_config
from tests.tiny_student import write_student
from tests.training_runs import train
from tests.unit.vpmoe.test_provenance_blocks import whole
from vpmoe.checkpoints import contents, soundness, tables
from vpmoe.checkpoints.difference import compared
from vpmoe.cli import main
from vpmoe.hf.convert import Carried, run_state
from vpmoe.weights import LazyTensor
from vpmoe.weights.megatron_checkpoint import read_weights, write_checkpoint

pytestmark = pytest.mark.slow
LAST, HALF, ROWS = 4, 2, 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    done = train(run, dataset, train_iters=LAST, save_interval=HALF, num_layers=2, lr_warmup_iters=1)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy, to do harm to."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def asked(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> Any:
    """What a verb prints as JSON."""
    capsys.readouterr()
    assert main(["checkpoint", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def iteration(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"iter_{number:07d}"


def test_what_a_run_is(trained: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, "inspect", trained)
    count = parameter_count(tiny_config(num_layers=2))
    assert found["kind"] == "run" and found["sound"] and found["iteration"] == LAST and found["unread"] == []
    assert found["model"]["parameters"] == count.total and found["model"]["active"] == count.active
    assert found["run"]["rows"] == ROWS and found["run"]["positions"] == ROWS * 48 > found["run"]["tokens"] > 0
    assert found["layout"] == {"processes": 1, "data": 1, "tensor": 1, "pipeline": 1, "expert": 1}
    assert [each["name"] for each in found["checkpoints"]] == ["iter_0000004", "iter_0000002"]
    block = found["provenance"]
    assert whole(block) and block["dataset_manifest_sha256"] == read_manifest(dataset).sha256
    # The buffers, one router's expert biases, are no parameters.
    tensors = found["tensors"]
    assert sum(group["elements"] for group in tensors["weights"].values()) == count.total + 8
    assert list(tensors) == ["weights", "exp_avg", "exp_avg_sq", "momentum_buffer", "second_moment"]
    assert tensors["weights"]["routed experts"]["dtypes"] == ["float32"] and "other" not in tensors["weights"]
    assert main(["checkpoint", "inspect", str(trained)]) == 0
    shown = capsys.readouterr().out
    assert "4 of 4 of the run" in shown and "16 rows" in shown and "names and sizes are sound" in shown
    biases = asked(capsys, "inspect", iteration(trained, HALF), "--tensors", "*expert_bias")
    assert [(row["shape"], row["dtype"], row["bytes"]) for row in biases] == [([8], "float32", 32)]


def test_what_is_damaged_is_told_as_far_as_it_can_be_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = iteration(run, LAST)
    (newest / ".metadata").write_bytes(b"garbage")
    found = asked(capsys, "inspect", newest)
    assert not found["sound"] and ".metadata has 7 bytes" in found["damages"][0]
    assert found["run"]["rows"] == ROWS and found["tensors"] is None and "torch_dist" in found["unread"][0]
    of_run = asked(capsys, "inspect", run)
    assert of_run["iteration"] == HALF and not of_run["sound"]
    assert [each["sound"] for each in of_run["checkpoints"]] == [False, True]


@hypothesis.given(data=st.data())
def test_a_state_of_any_other_form_is_told_too(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    state = json.loads((iteration(trained, LAST) / "run_state.json").read_text())
    checkpoint = tmp_path_factory.mktemp("made") / "iter_0000004"
    checkpoint.mkdir()
    (checkpoint / "run_state.json").write_text(json.dumps(data.draw(changed_json(state))))
    found = contents.inspected(checkpoint)
    assert found["unread"] and tables.contents_text(json.loads(json.dumps(found)))


def test_every_damage_is_named_and_nothing_is_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0 and capsys.readouterr().out.count(": sound") == 2
    first, second = iteration(run, HALF), iteration(run, LAST)
    flipped = max(first.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    (first / "common.pt").unlink()
    (second / "run_state.json").write_bytes((second / "run_state.json").read_bytes()[:-9])
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("77")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}
    assert main(["checkpoint", "verify", str(run)]) == 1
    shown = capsys.readouterr().out
    assert f"{flipped.name} does not have the sha256" in shown and "common.pt is missing" in shown
    assert "run_state.json has" in shown and "77" in shown and shown.count("DAMAGED") == 3
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")} == before
    (second / "files.json").write_text("[]")
    (entry,) = asked(capsys, "verify", second, code=1)
    assert "files.json" in entry["damages"][0]


def test_what_a_run_prunes_meanwhile_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pruned(of: Any, *rest: Any) -> list[str]:
        if of.folder == iteration(run, HALF):
            shutil.rmtree(of.folder)
        return damages(of, *rest)

    damages = soundness.damages
    monkeypatch.setattr(soundness, "damages", pruned)
    (entry,) = asked(capsys, "verify", run)
    assert entry["path"] == str(iteration(run, LAST)) and entry["damages"] == []


def test_differences(trained: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = iteration(run, LAST)
    same = asked(capsys, "diff", trained, last)
    assert same["configuration"] == same["provenance"] == [] and set(same["counts"]) == {"equal"}
    earlier = asked(capsys, "diff", iteration(run, HALF), last, code=1)
    assert earlier["counts"]["differ"] > earlier["counts"].get("equal", 0)
    keys = len(asked(capsys, "inspect", last, "--tensors", "[!o]*")) + 1  # all but "optimizer.", and the output layer
    assert asked(capsys, "diff", trained, run, "--weights")["counts"] == {"equal": keys}

    # Weights alone, one value of which is moved by an eighth; their checkpoint has no optimizer.
    weights, name = read_weights(last), "decoder.final_layernorm.weight"
    moved = weights[name].read().clone()
    moved[3] += 0.125
    state = run_state(tiny_config(num_layers=2), Carried(50))
    write_checkpoint(tmp_path / "made", {**weights, name: LazyTensor.of(moved)}, state)
    found = asked(capsys, "diff", last, tmp_path / "made", "--weights", code=1)
    (only,) = found["tensors"]
    assert (only["name"], only["largest"]) == (name, pytest.approx(0.125, abs=1e-6)) and found["counts"]["differ"] == 1
    assert asked(capsys, "diff", last, tmp_path / "made", code=1)["counts"]["first"] > 0
    assert any(line.startswith("training.") for line in found["configuration"])
    assert main(["checkpoint", "diff", str(last), str(tmp_path / "made")]) == 1
    assert f"{name}: max abs 1.250e-01" in capsys.readouterr().out


def test_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights are the checkpoint's; its receipt lists its files; what nobody has listed is refused by name."""
    made, exported = write_student(tmp_path / "made", num_layers=2), tmp_path / "hf"
    assert main(["hf", "export", str(made), str(exported)]) == 0
    assert asked(capsys, "diff", made, exported)["counts"] == {"equal": len(read_weights(made))}
    found = asked(capsys, "inspect", exported)
    assert found["kind"] == "HF directory" and whole(found["receipt"]["provenance"]) and found["sound"]
    assert found["tensors"]["weights"]["routed experts"]["elements"] > 0 and "other" not in found["tensors"]["weights"]
    of_made = asked(capsys, "inspect", made)
    assert of_made["iteration"] == 0 and of_made["provenance"] is None and of_made["model"]["layers"] == 2
    imported = tmp_path / "again"
    assert main(["hf", "import", str(exported), str(imported)]) == 0
    assert asked(capsys, "inspect", imported)["kind"] == "object"
    assert set(asked(capsys, "diff", made, imported)["counts"]) == {"equal"}
    (entry,) = asked(capsys, "verify", imported)
    assert entry["damages"] == [] and entry["files"] > 4
    (imported / "iter_0000000" / "common.pt").write_bytes(b"")
    assert "iter_0000000/common.pt has 0 bytes" in asked(capsys, "verify", imported, code=1)[0]["damages"][0]
    assert asked(capsys, "verify", exported)[0]["damages"] == []
    with (exported / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x77")
    assert asked(capsys, "verify", exported, code=1)[0]["damages"] == [
        "model.safetensors does not have the sha256 that was written"
    ]
    (exported / "receipt.json").unlink()
    assert main(["checkpoint", "verify", str(exported)]) == 2
    assert "it has no receipt" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["inspect", "verify", "diff"])
def test_what_is_no_checkpoint_is_refused(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, said in ((tmp_path, "no checkpoint lies there"), (tmp_path / "absent", "there is no such folder")):
        assert main(["checkpoint", verb, *[str(place)] * (2 if verb == "diff" else 1)]) == 2
        shown = capsys.readouterr().err
        assert said in shown and "remedy" in shown and "Traceback" not in shown


def test_values_are_compared_as_they_are() -> None:
    def of(*values: float, dtype: torch.dtype = torch.float32) -> LazyTensor:
        return LazyTensor.of(torch.tensor(values, dtype=dtype))

    assert compared("x", of(1.0, math.nan), of(1.0, math.nan)).equal
    assert not compared("x", of(0.0), of(-0.0)).equal and compared("x", of(0.0), of(-0.0)).largest == 0
    assert compared("x", of(1.0, math.inf, 2.0), of(1.0, 3.0, 2.5)).nonfinite == 1
    apart = compared("x", of(1.0, 2.0), of(1.0, 2.5))
    assert (apart.largest, apart.relative, apart.nonfinite) == (0.5, 0.2, 0)
    narrow = compared("x", of(1.0), of(1.0, dtype=torch.bfloat16))
    assert narrow.dtypes == ("float32", "bfloat16") and narrow.largest == 0 and not narrow.equal
    assert str(compared("x", of(1.0), of(1.0, 2.0))) == "shapes [1] and [2]"
