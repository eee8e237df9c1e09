"""Our rows are mergekit-tokensurgeon's, bit for bit; batches survive an interruption; a k that explodes is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.unit.vpmoe.upcycle.tiny_vocabularies import write_donor, write_model
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.token_surgery import Surgery, new_rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("vocabularies")
    return write_model(root / "model"), write_donor(root / "donor", model_type="llama", tied=True)


def surgery_of(folders: tuple[Path, Path], **changes: object) -> Surgery:
    model, donor = folders
    fields = {
        "source": load_file(model / "model.safetensors")["model.embed_tokens.weight"],
        "donor": load_file(donor / "model.safetensors")["model.embed_tokens.weight"],
        "source_tokenizer": AutoTokenizer.from_pretrained(model),
        "donor_tokenizer": AutoTokenizer.from_pretrained(donor),
        "k": 5,
        "batch_size": 16,
    }
    return Surgery(**{**fields, **changes})


def silent(_what: str, _size: int) -> None:
    return


def test_rows_are_those_of_the_command_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from click.testing import CliRunner
    from mergekit.scripts.tokensurgeon import main

    model, donor = folders
    words = [str(model), str(donor), str(tmp_path / "out"), "-k", "5", "-a", "omp", "--batch-size", "16"]
    answer = CliRunner().invoke(main, words, catch_exceptions=False)
    assert answer.exit_code == 0
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in theirs
    rows, assignment = new_rows(surgery_of(folders), tmp_path / "scratch", silent)
    assert len(assignment.approximated) > 20 and len(assignment.copied) > 200
    assert torch.equal(rows, theirs["model.embed_tokens.weight"])


def test_finished_batches_are_not_computed_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    surgery = surgery_of(folders)
    steps: list[str] = []

    def interrupt(what: str, _size: int) -> None:
        steps.append(what)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_rows(surgery, tmp_path / "a", interrupt)
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    assert len(first) == 2
    rows, _ = new_rows(surgery, tmp_path / "a", silent)
    assert all((tmp_path / "a" / name).stat().st_mtime_ns == time for name, time in first.items())
    straight, _ = new_rows(surgery, tmp_path / "b", silent)
    assert torch.equal(rows, straight)


@pytest.mark.parametrize(("k", "what"), [(24, "the donor's hidden size"), (32, "the model's hidden size")])
def test_a_k_that_determines_nothing_is_refused(folders: tuple[Path, Path], tmp_path: Path, k: int, what: str) -> None:
    with pytest.raises(UpcycleError, match=what):
        new_rows(surgery_of(folders, k=k), tmp_path, silent)


@pytest.mark.parametrize("whose", ["source", "donor"])
def test_ids_without_rows_are_refused(folders: tuple[Path, Path], tmp_path: Path, whose: str) -> None:
    surgery = surgery_of(folders)
    few = getattr(surgery, whose)[:300]
    with pytest.raises(UpcycleError, match=r"the id 3\d\d, and its embedding has 300 rows"):
        new_rows(surgery_of(folders, **{whose: few}), tmp_path, silent)
