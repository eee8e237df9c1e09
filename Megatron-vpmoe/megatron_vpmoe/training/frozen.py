"""Frozen models beside the one that is trained: a reference of its geometry, a teacher of its vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_vpmoe.annotation import REFERENCE_LOG_P
from megatron_vpmoe.data.vocabulary_files import another_vocabulary
from megatron_vpmoe.errors import CheckpointError, ConfigError
from megatron_vpmoe.manifest import BUILD_REMEDY, Manifest, read_sealed
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.sources import FrozenModel, Reference, Teacher
from megatron_vpmoe.training import checkpoint
from megatron_vpmoe.training.initial_weights import find_weights, geometry_of, load_weights, refuse_another_geometry

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


@dataclass(frozen=True)
class Frozen:
    """A model that annotates, found and not yet loaded.

    Attributes:
        annotator: of batches; may be asked once ``open`` has given it the model.
        found: the checkpoint of its weights.
        cfg: what to build it by.
        key: of the field that names it.
    """

    annotator: FrozenModel
    found: checkpoint.Found
    cfg: RunConfig
    key: str

    def open(self) -> str:
        """Load it, in bf16 where the run is or ``reference_bf16`` asks for it; returns a line for the log."""
        model = build_model(self.cfg)
        load_weights(model, self.found, self.key)
        self.annotator.open(model)
        names = ", ".join(annotation.name for annotation in self.annotator.annotations)
        return f"{names} from {self.found.path}"


def check_stored_reference(cfg: RunConfig, manifest: Manifest) -> None:
    """Hold the model that scored a dataset's ``reference_log_p`` ahead of time to the one that is trained.

    Raises:
        CheckpointError: it is of another geometry. Everything that differs is named.
    """
    for scored in read_sealed(manifest.root, BUILD_REMEDY.format(path=manifest.root)).get("annotated", ()):
        by = scored["by"]
        if REFERENCE_LOG_P.name in scored["names"] and "geometry" in by:  # older ones have a hash of it alone
            refuse_another_geometry(by["geometry"], cfg, f"{manifest.path}: {REFERENCE_LOG_P.name} by {by['name']}")


def find_frozen(cfg: RunConfig, manifest: Manifest) -> list[Frozen]:
    """Those that ``training.{reference,teacher}_weights`` name; a collective. No weight is allocated.

    Raises:
        CheckpointError: there is no such checkpoint, or it is of another vocabulary or of a geometry that does not do.
        ConfigError: the vocabulary has fewer than ``kd_top_k`` ids.
    """
    t, found = cfg.training, []
    bf16 = cfg.model_copy(update={"training": t.model_copy(update={"bf16": t.bf16 or t.reference_bf16})})
    if t.reference_weights is not None:
        temperature = cfg.rollouts.rollout_temperature if cfg.samples else 1.0
        key = "training.reference_weights"
        found.append(Frozen(Reference(temperature), find_weights(cfg, t.reference_weights, key), bf16, key))
    if t.teacher_weights is not None:
        key, size = "training.teacher_weights", manifest.tokenizer.vocab_size
        top_k, temperature = t.kd_top_k, t.kd_temperature
        if t.objective == "on_policy":
            top_k, temperature = top_k if t.opd_loss == "topk" else 0, cfg.rollouts.rollout_temperature
        if top_k > size:
            raise ConfigError(
                f"{top_k} ids a token of the {size} that the dataset's vocabulary has",
                source="training.kd_top_k",
                remedy=f"ask for at most {size}",
            )
        weights, teacher = geometry_of(bf16, t.teacher_weights, key)
        found.append(Frozen(Teacher(top_k, temperature, size), weights, teacher, key))
    for each in found:
        path = each.found.path
        if other := another_vocabulary(checkpoint.Carried.of(each.found).assets, manifest, str(path)):
            raise CheckpointError(other, source=f"{each.key} = {path}", remedy="name a model of this vocabulary")
    return found
