"""A served teacher: what it says comes through, whatever goes wrong on the way; what it cannot say is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.launch.preflight import check_served_teacher
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.sources import Passage
from megatron_vpmoe.teacher_records import FILLING_LOG_P
from megatron_vpmoe.training.frozen import TeacherRequest
from tests.stand_in_server import FAULTS, StandIn, serving
from tests.tiny import tiny_config
from vpmoe.cli import main
from vpmoe.data_curation.manifest import read_manifest as raw_manifest
from vpmoe.errors import DataError, TokenizerError, VpmoeError
from vpmoe.teacher import in_training
from vpmoe.teacher.selection import Selection
from vpmoe.teacher.server import ServerError, ServerTeacher, Settings
from vpmoe.teacher.store import score_dataset
from vpmoe.tokenizer import CompactVocabulary, load_tokenizer
from vpmoe.tokenizer.o200k_harmony import load_o200k_harmony

pytestmark = pytest.mark.slow
K = 8
QUICK = Settings("", concurrency=3, first_wait=0.01, timeout=0.5)
TEN = Selection(token_budget=400)


@pytest.fixture(scope="module")
def full(kd_dataset: Path) -> StandIn:
    """The full vocabulary, of which the dataset has a part; a tenth of what is likely lies outside."""
    student = load_tokenizer(kd_dataset)
    assert isinstance(student, CompactVocabulary)
    outside = np.setdiff1d(np.arange(1000, 90_000), student.o200k_ids)[::2000]
    texts = [piece.decode(errors="replace") for piece in load_o200k_harmony().pieces()]
    return StandIn(np.concatenate([student.o200k_ids, outside]).astype(np.int64), texts)


def asked_of(stand_in: StandIn, dataset: Path, output: Path, settings: Settings = QUICK, **more: Any) -> Path:
    teacher = ServerTeacher(replace(settings, address=stand_in.address))
    how = {"count": K, "coding": "exact", "selection": TEN, "quiet": True, "say": print}
    score_dataset(dataset, teacher, output, **{**how, **more})
    return output


def again(stand_in: StandIn, **changes: Any) -> StandIn:
    fresh = StandIn(stand_in.ids, stand_in.texts, changes.pop("form", "vllm"))
    vars(fresh).update(changes)
    return fresh


@pytest.fixture(scope="module")
def whole(full: StandIn, kd_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with serving(again(full)) as stand_in:
        return asked_of(stand_in, kd_dataset, tmp_path_factory.mktemp("served") / "whole")


def records(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "train").glob("*_teacher.*"))}


def test_what_the_server_says_is_what_is_stored(full: StandIn, kd_dataset: Path, whole: Path) -> None:
    student = load_tokenizer(kd_dataset)
    assert isinstance(student, CompactVocabulary)
    lost, positions = 0.0, 0
    for document in (KDDataset(read_manifest(whole), "train", seq_length=192)[number] for number in range(3)):
        prompt = student.o200k_ids[document.tokens].tolist()
        for position in np.flatnonzero(document.loss_mask).tolist():
            said = full.place(prompt, position + 1, K)
            inside = [(int(student._compact_of[row]), p) for row, p in said[:K] if student._compact_of[row] >= 0]
            lost += sum(np.exp(p) for row, p in said[:K] if student._compact_of[row] < 0)
            found = document.annotations["teacher_ids"][position], document.annotations["teacher_log_p"][position]
            assert found[0][: len(inside)].tolist() == [row for row, _ in inside]
            np.testing.assert_allclose(found[1][: len(inside)], [p for _, p in inside], rtol=1e-6)
            assert (found[1][len(inside) :] == FILLING_LOG_P).all()
            of_label = dict(said)[prompt[position + 1]]
            assert document.annotations["teacher_label_log_p"][position] == pytest.approx(of_label, rel=1e-6)
            positions += 1
    told = raw_manifest(whole)["annotated"][-1]
    assert told["short_records"] > 0 and told["mean_lost_mass"] == pytest.approx(lost / positions, rel=0.3)
    assert told["by"]["form"] == "vllm" and told["by"]["model"] == "stand-in"


def test_the_forms_say_the_same(full: StandIn, kd_dataset: Path, whole: Path, tmp_path: Path) -> None:
    with serving(again(full, form="sglang")) as stand_in:
        asked_of(stand_in, kd_dataset, tmp_path / "sglang")
    assert raw_manifest(tmp_path / "sglang")["annotated"][-1]["by"]["form"] == "sglang"
    assert records(tmp_path / "sglang") == records(whole)


def test_faults_are_overcome(full: StandIn, kd_dataset: Path, whole: Path, tmp_path: Path) -> None:
    """Each kind, and two of them one after another."""
    faults = {2 + 2 * number: fault for number, fault in enumerate((*FAULTS, *FAULTS[:2]))}
    with serving(again(full, faults={**faults, 3: "nan"})) as stand_in:
        asked_of(stand_in, kd_dataset, tmp_path / "faulty")
        assert stand_in.asked > len(faults)
    assert records(tmp_path / "faulty") == records(whole)


def test_a_server_that_dies_half_way_costs_nothing(
    full: StandIn, kd_dataset: Path, whole: Path, tmp_path: Path
) -> None:
    with serving(again(full, dead_from=6)) as stand_in:
        with pytest.raises(ServerError, match=r"no usable answer in 2 attempts: .*500"):
            asked_of(stand_in, kd_dataset, tmp_path / "died", replace(QUICK, attempts=2, concurrency=1))
        stand_in.dead_from, stand_in.asked = None, 0
        # The address is no part of the key: another server of the same model goes on.
        asked_of(stand_in, kd_dataset, tmp_path / "died", replace(QUICK, concurrency=1))
        rest = stand_in.asked
    with serving(again(full)) as stand_in:
        asked_of(stand_in, kd_dataset, tmp_path / "counted", replace(QUICK, concurrency=1))
        assert rest < stand_in.asked - 2
    assert records(tmp_path / "died") == records(whole)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"longest": 40}, ServerError, "it truncates prompts"),
        ({"most": 3}, ServerError, "of the 8 likeliest"),
        ({"dead_from": 0}, ServerError, "no usable answer in 2 attempts"),
        ({"texts": ["?"] * 201_088}, TokenizerError, "to the server"),
        ({"texts": [None] * 201_088}, TokenizerError, "--teacher-tokenizer"),
    ],
)
def test_what_cannot_be_used_is_found_on_the_first_answer(
    changes: dict[str, Any], error: type[VpmoeError], said: str, full: StandIn, kd_dataset: Path, tmp_path: Path
) -> None:
    with serving(again(full, **changes)) as stand_in:
        with pytest.raises(error, match=said):
            asked_of(stand_in, kd_dataset, tmp_path / "no")
        assert stand_in.asked <= 2


def test_a_temperature_or_a_model_that_it_has_not(full: StandIn, kd_dataset: Path, tmp_path: Path) -> None:
    with serving(again(full)) as stand_in:
        with pytest.raises(DataError, match="at temperature 1, not 2"):
            asked_of(stand_in, kd_dataset, tmp_path / "no", temperature=2.0)
        with pytest.raises(ServerError, match="serves stand-in, not other"):
            asked_of(stand_in, kd_dataset, tmp_path / "no", replace(QUICK, model="other"))
    shutil.rmtree(tmp_path / "no.partial", ignore_errors=True)
    address = "http://127.0.0.1:9"  # nobody is there
    with pytest.raises(ServerError, match="no usable answer in 2 attempts"):
        ServerTeacher(replace(QUICK, address=address, attempts=2))
    for more in ([address, "--memory-gb", "1"], ["http://[", "--top-k", "4"], ["http://a:b"]):
        where = ["--output-dir", str(tmp_path / "no"), "--teacher", *more]
        assert main(["data", "score", str(kd_dataset), *where]) == 2


def training(stand_in: StandIn, dataset: Path, **fields: object) -> RunConfig:
    """Of a run whose teacher is served."""
    served = {"teacher_server": stand_in.address, "served_model": "stand-in", "padded_vocab_size": 448}
    taught = {"objective": "topk_kd", "kd_top_k": K, "seq_length": 192, "data_path": dataset}
    return tiny_config(**{**served, **taught, **fields})


@pytest.mark.parametrize("form", ["vllm", "sglang"])
def test_a_training_hears_what_the_store_has(full: StandIn, kd_dataset: Path, whole: Path, form: str) -> None:
    """Also of the label alone, and behind a token that the student drew from the rows that fill its vocabulary up."""
    manifest = read_manifest(whole)
    document = KDDataset(manifest, "train", seq_length=192)[0]
    positions = np.flatnonzero(document.loss_mask)
    passage = Passage(document.tokens.astype(np.int64), positions, document.labels[positions].astype(np.int64))
    drawn = passage._replace(tokens=passage.tokens.copy(), labels=passage.labels.copy())
    drawn.tokens[positions[4] + 1] = drawn.labels[4] = 447
    stored = [document.annotations[name][positions] for name in ("teacher_ids", "teacher_log_p", "teacher_label_log_p")]
    with serving(again(full, form=form)) as stand_in:
        for count in (K, 0):
            speaker = in_training.speak(TeacherRequest(training(stand_in, kd_dataset), manifest, count))
            said, of_drawn = (future.result() for future in [speaker.ask(passage), speaker.ask(drawn)])
            speaker.close()
            for found, expected in zip(said, stored, strict=True):
                np.testing.assert_array_equal(found, expected[..., :count] if expected.ndim == 2 else expected)
            np.testing.assert_array_equal(of_drawn[0][:5], said[0][:5])
            assert of_drawn[2][4] == FILLING_LOG_P and np.isfinite(of_drawn[2]).all()
            assert (of_drawn[2][:4] == said[2][:4]).all() and (of_drawn[2][5:8] != said[2][5:8]).all()


@pytest.mark.parametrize(
    ("changes", "fields", "error", "said"),
    [
        ({"most": 3}, {}, ServerError, "of the 8 likeliest"),
        ({"dead_from": 0}, {}, ServerError, "no usable answer in 2 attempts"),
        ({"texts": ["?"] * 201_088}, {}, TokenizerError, "to the server"),
        ({}, {"kd_top_k": 440}, ConfigError, "440 ids a token of the 400"),
        ({}, {"served_model": "other"}, ServerError, "serves stand-in, not other"),
        ({}, {"teacher_tokenizer": "nowhere"}, TokenizerError, "nowhere"),
    ],
)
def test_a_training_without_its_teacher_does_not_start(
    changes: dict[str, Any], fields: dict[str, Any], error: type[VpmoeError], said: str, full: StandIn, kd_dataset: Path
) -> None:
    with serving(again(full, **changes)) as stand_in:
        with pytest.raises(error, match=said):
            check_served_teacher(training(stand_in, kd_dataset, **fields))
        check_served_teacher(tiny_config())
