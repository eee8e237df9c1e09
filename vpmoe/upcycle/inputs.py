"""What a job reads: an object that is there, unaltered, of its declared geometry and hashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.files import file_entry, first_damage
from vpmoe import steps
from vpmoe.errors import UpcycleError
from vpmoe.hf.convert import ASSETS
from vpmoe.upcycle.ladder_file import ObjectSpec, geometry
from vpmoe.weights.geometry import geometry_of
from vpmoe.weights.megatron_checkpoint import checkpoint_in
from vpmoe.weights.safetensors_folder import INDEX, weight_files

MEGATRON = "megatron"
"""Folder of an object that holds its checkpoint."""


@dataclass(frozen=True)
class Input:
    """An input object, checked.

    Attributes:
        spec: its entry.
        cfg: its geometry; None where a source declares none.
        content: its files' names, sizes and hashes.
        receipt: of what a job made.
    """

    spec: ObjectSpec
    cfg: RunConfig | None
    content: dict[str, dict[str, Any]]
    receipt: dict[str, Any] | None

    @property
    def hf(self) -> Path:
        """Its HF directory."""
        path = Path(self.spec.path)
        return path if self.spec.is_source else path / "hf"

    @property
    def checkpoint(self) -> Path:
        """Its Megatron checkpoint; of what a job made."""
        assert not self.spec.is_source, f"{self.spec.id} is an HF directory"
        return checkpoint_of(Path(self.spec.path))

    @property
    def identity(self) -> dict[str, str]:
        """What later keys hold of it."""
        return {"files": steps.content_sha256(self.content)} if self.receipt is None else identity_of(self.receipt)


def checkpoint_of(folder: Path) -> Path:
    """Where an object's checkpoint lies."""
    return checkpoint_in(folder / MEGATRON)


def identity_of(receipt: Mapping[str, Any]) -> dict[str, str]:
    """What decides what is made from an object: its weights, and the vocabulary and configuration in its ``hf/``.

    Not every byte of it: the same weights trained again have another metrics.jsonl.
    """
    files = receipt["files"]
    besides = {name: files[name] for name in files if name.startswith("hf/") and ".safetensors" not in name}
    return {"weights": receipt["report"]["weights_sha256"], "hf": steps.content_sha256(besides)}


def open_input(spec: ObjectSpec, *, check_hashes: bool = True) -> Input:
    """Check an input object: it is there, unaltered, and of its declared hashes.

    Raises:
        UpcycleError: it is not.
        NotOursError: what lies there has no sound receipt.
    """
    folder = Path(spec.path)
    if spec.is_source:
        return Input(spec, geometry(spec), _source_content(spec, folder), None)
    if not folder.is_dir():
        raise UpcycleError(f"{spec.id} is not made yet", source=str(folder), remedy=f"vpmoe upcycle run {spec.id}")
    receipt = steps.read_receipt(folder)
    made = receipt["key"].get("object")
    if made != spec.id:
        raise UpcycleError(f"this is {made}, not {spec.id}", source=str(folder), remedy="correct the path")
    fault = first_damage(folder, receipt["files"], check_hashes=check_hashes)
    cfg = geometry(spec)
    assert cfg is not None
    if fault is None and receipt["key"]["geometry"] != geometry_of(cfg):
        fault = "the receipt's geometry is not the declared one any more"
    if fault is not None:
        raise UpcycleError(f"{spec.id}: {fault}", source=str(folder), remedy=f"vpmoe upcycle run {spec.id} --overwrite")
    return Input(spec, cfg, receipt["files"], receipt)


def _source_content(spec: ObjectSpec, folder: Path) -> dict[str, dict[str, Any]]:
    if not folder.is_dir():
        raise UpcycleError(
            f"{spec.id} is missing",
            source=str(folder),
            remedy="put the HF directory there" + (f"; it is published as {spec.origin}" if spec.origin else ""),
        )
    names = ["config.json", INDEX, *weight_files(folder, partial=spec.partial), *ASSETS]
    content = {name: file_entry(folder / name) for name in sorted({*names}) if (folder / name).is_file()}
    for name, expected in spec.sha256.items():
        found = content.get(name, {}).get("sha256")
        if found != expected:
            raise UpcycleError(
                f"{spec.id}: {name} has sha256 {found}, {expected} is declared",
                source=str(folder / name),
                remedy="fetch the declared revision, or correct the entry",
            )
    return content
