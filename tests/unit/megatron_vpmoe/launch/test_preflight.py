"""What does not fit the machine or the run is found before a process starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_vpmoe.config import fit_report, load_config
from megatron_vpmoe.errors import CheckpointError, ConfigError, DataError, DeviceError, TokenizerError
from megatron_vpmoe.files import write_record
from megatron_vpmoe.launch import preflight
from megatron_vpmoe.runtime import device


def test_a_missing_dataset(run_yaml: Path) -> None:
    with pytest.raises(DataError, match="build_synth_kd_v1"):
        preflight.check_dataset(load_config(run_yaml))


@pytest.mark.parametrize(("vocabulary", "error"), [(1024, TokenizerError), (512, DataError)])
def test_both_splits_are_opened_for_the_model(run_yaml: Path, vocabulary: int, error: type[Exception]) -> None:
    """Another vocabulary is refused as such; the right one gets as far as the missing training split."""
    cfg = load_config(run_yaml)
    tokenizer = {
        "name": "o200k_harmony_compact",
        "rank_file_sha256": "0" * 64,
        "vocab_size": 500,
        "padded_vocab_size": vocabulary,
        "eod_id": 1,
        "special_tokens": {},
        "compact_map": None,
        "pieces": {"path": "token_pieces.txt", "sha256": "0" * 64},
    }
    manifest = {"schema_version": 1, "kind": "harmony_kd", "seq_length": 64, "tokenizer": tokenizer, "splits": {}}
    write_record(Path(cfg.data.data_path) / "manifest.json", manifest)
    with pytest.raises(error):
        preflight.check_dataset(cfg)


def test_weights_to_start_from_are_looked_for(run_yaml: Path, tmp_path: Path) -> None:
    cfg = load_config(run_yaml, ["--load-weights", str(tmp_path / "nowhere")])
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        preflight.check_run_directory(cfg)


@pytest.mark.parametrize("kind", ["file", "below a file", "read-only", "full"])
def test_a_place_where_no_run_can_be_kept(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = tmp_path / "place"
    if "file" in kind:
        place.write_text("")
    if kind == "read-only":
        monkeypatch.setattr("os.access", lambda *_: False)
    if kind == "full":
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5000))
    cfg = load_config(run_yaml, ["--run-dir", str(place / "run" if kind == "below a file" else place)])
    with pytest.raises(ConfigError, match=r"cannot be kept there(.|\n)*place"):
        preflight.check_run_directory(cfg)


def test_the_nano_counterpart_is_found_by_what_it_extends(repository: Path, run_yaml: Path) -> None:
    found = preflight.nano_counterpart(repository / "configs" / "vpmoe_stage1.yaml")
    assert found is not None
    assert Path(found) == repository / "configs" / "nano" / "stage1.yaml"
    assert preflight.nano_counterpart(run_yaml) is None


def test_a_machine_without_enough_memory(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage1 = repository / "configs" / "vpmoe_stage1.yaml"
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setattr(device, "available_memory", lambda: (24 * 2**30, "CPU", 1))
    with pytest.raises(DeviceError, match=r"nano/stage1\.yaml"):
        preflight.check_machine(load_config(stage1), stage1)


def test_a_format_of_the_experts_that_is_not_for_this_machine(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before a process starts, by the card that a child process asked."""
    monkeypatch.setattr(device, "available_memory", lambda: (400 * 2**30, "NVIDIA H100", 8))
    monkeypatch.setattr(device, "compute_capability", lambda: (9, 0))
    stage1 = repository / "configs" / "vpmoe_stage1.yaml"
    with pytest.raises(DeviceError, match=r"mxfp8 wants a card of compute capability 10\.0, and this one's is 9\.0"):
        preflight.check_machine(load_config(stage1, ["--experts-precision", "mxfp8"]), stage1)


def test_layers_are_compiled_by_something(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(run_yaml, ["--compile", "layers"])
    monkeypatch.setattr(preflight, "machine_report", lambda _cfg: fit_report(cfg, 2**40, "CPU", 1))
    preflight.check_machine(cfg, run_yaml)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DeviceError, match=r"no C\+\+ compiler 'no-such-compiler'(.|\n)*--compile off"):
        preflight.check_machine(cfg, run_yaml)


def test_a_teacher_is_looked_for_before_any_process_starts(run_yaml: Path, tmp_path: Path) -> None:
    cfg = load_config(run_yaml, ["--objective", "topk_kd", "--teacher-weights", str(tmp_path / "none")])
    with pytest.raises(CheckpointError, match="none"):
        preflight.machine_report(cfg)
    assert preflight.teacher_of(load_config(run_yaml)) is None


def test_more_processes_than_gpus(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(run_yaml)
    plenty = fit_report(cfg, 2**40, "NVIDIA H200", device_count=1)
    monkeypatch.setattr(preflight, "machine_report", lambda _cfg: plenty)
    with pytest.raises(DeviceError, match="2 would share one NVIDIA H200"):
        preflight.check_machine(cfg, run_yaml)
    monkeypatch.setattr(preflight, "machine_report", lambda _cfg: fit_report(cfg, 2**40, "NVIDIA H200", 2))
    preflight.check_machine(cfg, run_yaml)
