"""Second models that annotate batches: frozen in memory, a reference of the run's geometry or a teacher of its
vocabulary; or a teacher that is served elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from megatron_vpmoe.annotation import REFERENCE_LOG_P
from megatron_vpmoe.data.vocabulary_files import another_vocabulary
from megatron_vpmoe.errors import CheckpointError, ConfigError
from megatron_vpmoe.manifest import BUILD_REMEDY, Manifest, read_sealed
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.named import imported
from megatron_vpmoe.sources import Annotator, FrozenModel, Reference, Served, Server, Teacher
from megatron_vpmoe.training import checkpoint
from megatron_vpmoe.training.initial_weights import find_weights, geometry_of, load_weights, refuse_another_geometry

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


_SPEAKS = "vpmoe.teacher.in_training:speak"
"""Who speaks to a server; imported only where a configuration names one."""


@dataclass(frozen=True)
class TeacherRequest:
    """What a run asks of a served teacher.

    Attributes:
        cfg: of the run; what ``training.teacher_server`` and its like say.
        manifest: of the run's first dataset, whose vocabulary is the model's.
        top_k: ids a token; 0: the log-probability of the label alone.
    """

    cfg: RunConfig
    manifest: Manifest
    top_k: int


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
        return _told(self.annotator, str(self.found.path))


@dataclass(frozen=True)
class Remote:
    """A teacher that is served, probed already.

    Attributes:
        annotator: of batches.
        cfg: of the run.
    """

    annotator: Served
    cfg: RunConfig

    def open(self) -> str:
        """Nothing has to be loaded; returns a line for the log."""
        return _told(self.annotator, f"{self.cfg.training.served_model} at {self.cfg.training.teacher_server}")


def _told(annotator: Annotator, where: str) -> str:
    return f"{', '.join(annotation.name for annotation in annotator.annotations)} from {where}"


def check_stored_reference(cfg: RunConfig, manifest: Manifest) -> None:
    """Hold the model that scored a dataset's ``reference_log_p`` ahead of time to the one that is trained.

    Raises:
        CheckpointError: it is of another geometry. Everything that differs is named.
    """
    for scored in read_sealed(manifest.root, BUILD_REMEDY.format(path=manifest.root)).get("annotated", ()):
        by = scored["by"]
        if REFERENCE_LOG_P.name in scored["names"] and "geometry" in by:  # older ones have a hash of it alone
            refuse_another_geometry(by["geometry"], cfg, f"{manifest.path}: {REFERENCE_LOG_P.name} by {by['name']}")


def find_annotators(cfg: RunConfig, manifest: Manifest) -> list[Frozen | Remote]:
    """Those that ``training.{reference,teacher}_weights`` and ``teacher_server`` name; a collective.

    No weight is allocated; a server is probed.

    Raises:
        CheckpointError: there is no such checkpoint, or it is of another vocabulary or of a geometry that does not do.
        ConfigError: the vocabulary has fewer than ``kd_top_k`` ids, or nobody can speak to a server.
        VpmoeError: a rank does not reach the server, or what that says cannot be used; on every rank.
    """
    t, found = cfg.training, list[Frozen]()
    bf16 = cfg.model_copy(update={"training": t.model_copy(update={"bf16": t.bf16 or t.reference_bf16})})
    if t.reference_weights is not None:
        temperature = cfg.rollouts.rollout_temperature if cfg.samples else 1.0
        key = "training.reference_weights"
        found.append(Frozen(Reference(temperature), find_weights(cfg, t.reference_weights, key), bf16, key))
    if t.teacher_weights is not None:
        key, temperature = "training.teacher_weights", t.kd_temperature
        if t.objective == "on_policy":
            temperature = cfg.rollouts.rollout_temperature
        weights, teacher = geometry_of(bf16, t.teacher_weights, key)
        annotator = Teacher(_ids_asked_for(cfg, manifest), temperature, manifest.tokenizer.vocab_size)
        found.append(Frozen(annotator, weights, teacher, key))
    for each in found:
        path = each.found.path
        if other := another_vocabulary(checkpoint.Carried.of(each.found).assets, manifest, str(path)):
            raise CheckpointError(other, source=f"{each.key} = {path}", remedy="name a model of this vocabulary")
    if t.teacher_server is None:
        return [*found]
    server = distributed.on_every_rank(lambda: speak_to_teacher(cfg, manifest))
    return [*found, Remote(Served(server, _ids_asked_for(cfg, manifest)), cfg)]


def speak_to_teacher(cfg: RunConfig, manifest: Manifest) -> Server:
    """Who speaks to ``training.teacher_server``, which has been probed.

    Raises:
        ConfigError: the vocabulary has fewer than ``kd_top_k`` ids, or nobody can speak to servers.
        VpmoeError: it is not there, or what it says cannot be used.
    """
    remedy = "install the package vpmoe beside this one, or take teacher_weights"
    speak = imported(_SPEAKS, "speaker", source="training.teacher_server", remedy=remedy)
    return cast(Server, speak(TeacherRequest(cfg, manifest, _ids_asked_for(cfg, manifest))))


def _ids_asked_for(cfg: RunConfig, manifest: Manifest) -> int:
    """Of each token; raises :class:`ConfigError` where the vocabulary has fewer."""
    t, size = cfg.training, manifest.tokenizer.vocab_size
    if t.objective == "on_policy" and t.opd_loss == "sampled":
        return 0
    if t.kd_top_k > size:
        raise ConfigError(
            f"{t.kd_top_k} ids a token of the {size} that the dataset's vocabulary has",
            source="training.kd_top_k",
            remedy=f"ask for at most {size}",
        )
    return t.kd_top_k
