"""A decoding step as a program: read back, it is the model's own, and runs where there is nothing but torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_vpmoe.errors import CheckpointError, ConfigError
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.exported_step import MARK, ExportedStep, export_step
from megatron_vpmoe.generation.prompts import Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.generation.state_decoder import RowStates, decoder_of
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.think.decoding import empty
from tests.unit.megatron_vpmoe.think.test_think_experts import lively
from vpmoe.cli import main

PROMPTS = [[5, 9, 3], [7] * 9 + [2, 40], [11], [60, 1, 33, 33, 8, 21]]
NEW = 8
MODEL = {"run": "small", "iteration": 3}

ALONE = """
import json, sys, torch
extra = {"step.json": ""}
step = torch.export.load(sys.argv[1], extra_files=extra).module()
told, prompts, new = json.loads(extra["step.json"]), *map(json.loads, sys.argv[2:])
columns = max(map(len, prompts)) + new
state = {
    name: torch.zeros(len(prompts), *([columns] if one["grows"] else []), *one["shape"],
                      dtype=getattr(torch, one["dtype"][6:]))
    for name, one in told["entries"].items()
}
texts = [list(prompt) for prompt in prompts]
for at in range(columns - 1):
    token = torch.tensor([text[min(at, len(text) - 1)] for text in texts])
    logits, state = step(token, torch.full_like(token, at), state)
    for text, best in zip(texts, logits.argmax(-1).tolist()):
        if len(text) == at + 1:
            text.append(best)
texts = [text[len(prompt):len(prompt) + new] for text, prompt in zip(texts, prompts)]
own = sorted({"vpmoe", "megatron_vpmoe", "megatron"} & {name.split(".")[0] for name in sys.modules})
print(json.dumps({"texts": texts, "model": told["model"], "own": own}))
"""


ONE_LAYER = {
    "mixture": [{"layer_type": kind, "num_layers": 1} for kind in ("transformer", "state_space", "denoiser")],
    "state_space": None,
}


@pytest.fixture(scope="module", params=["mixture", "state_space"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[VPModel, Path]:
    request.getfixturevalue("groups")
    path = tmp_path_factory.mktemp("step") / "step.pt2"
    model = lively(request.param, mixture_experts=ONE_LAYER[request.param]).float()
    export_step(model, path, MODEL)
    assert MARK.encode() in path.read_bytes()
    return model, path


@pytest.fixture(scope="module")
def groups() -> None:
    from megatron_vpmoe.runtime import distributed

    if not torch.distributed.is_initialized():
        distributed.initialize(seed=1234)


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
def test_its_steps_are_the_models_own(exported: tuple[VPModel, Path]) -> None:
    """Any number of rows and columns; rows that begin anew over what another one has left; what is given stays."""
    model, path = exported
    step, decoder = ExportedStep.read(path), decoder_of(model, packed=False)
    assert step.vocab_size == model.vocab_size and step.model == MODEL
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((3, 9), (1, 16), (5, 40)):
        state = step.state(rows, columns)
        mine = empty(decoder.entries, rows, columns, torch.device("cpu"))  # type: ignore[union-attr]
        for at in range(8):
            token = torch.randint(0, model.vocab_size, (rows,), generator=generator)
            position = torch.full((rows,), at)
            position[0] = at % 5  # the first row's text ends behind five tokens, and another one begins
            before = {name: value.clone() for name, value in state.items()}
            with torch.no_grad():
                expected = decoder.step(token, position, RowStates(decoder.entries, mine), columns)  # type: ignore[union-attr]
            found, following = step.program(token, position, state)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert all(torch.equal(state[name], value) for name, value in before.items())
            state = following
        for (layer, name), value in mine.items():
            torch.testing.assert_close(state[f"{layer}.{name}"], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
def test_it_decodes_without_this_package_what_the_engine_does(exported: tuple[VPModel, Path], tmp_path: Path) -> None:
    model, path = exported
    expected = [one.ids for one in generate(model, [Prompt(ids) for ids in PROMPTS], SamplingOptions(NEW, ()))]
    assert len({token for ids in expected for token in ids}) >= len(PROMPTS)
    command = [sys.executable, "-c", ALONE, str(path), json.dumps(PROMPTS), str(NEW)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(told.stdout) == {"texts": expected, "model": MODEL, "own": []}


@pytest.mark.usefixtures("single_process")
def test_what_has_no_such_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keeps its cache in place"):
        export_step(lively("transformer").float(), tmp_path / "step.pt2", MODEL)
    mixture = lively("mixture").float()
    mixture.recall = SimpleNamespace(source="facts.vectors", entries=2)
    with pytest.raises(ConfigError, match=r"asks it in the middle(.|\n)*facts.vectors"):
        export_step(mixture, tmp_path / "step.pt2", MODEL)
    (tmp_path / "other.pt2").write_bytes(b"no program")
    with pytest.raises(CheckpointError, match="no step that was exported"):
        ExportedStep.read(tmp_path / "other.pt2")
    with pytest.raises(FileNotFoundError):
        ExportedStep.read(tmp_path / "none.pt2")
    assert not (tmp_path / "step.pt2").exists()


def test_what_is_no_step_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis").write_text("years of work")
    assert main(["checkpoint", "export-step", "run", "--output", str(tmp_path / "thesis"), "--overwrite"]) == 2
    assert "NotOursError" in capsys.readouterr().err and (tmp_path / "thesis").read_text() == "years of work"
