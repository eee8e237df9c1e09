"""What a model makes of the whole valid split of a dataset: its losses, and how far it is from a teacher there.

Shapes: B rows, S positions, N supervised positions of a batch, K ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vpmoe.annotation import TEACHER_IDS, TEACHER_LOG_P
from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.data.blend import Part
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.manifest import PREFERENCE, Manifest, read_manifest
from megatron_vpmoe.model.output import Divergence, ModelOutput
from megatron_vpmoe.objectives import Objective, ObjectiveResult, build_objective, check_kinds
from megatron_vpmoe.objectives.span_ce import SpanCE, means_by_span
from megatron_vpmoe.sources import ValidSource
from megatron_vpmoe.sources.reference import Teacher
from megatron_vpmoe.training.evaluate import evaluate
from vpmoe.eval.open_model import Opened, open_model

TOP_K = 64
"""Ids of a position beside the whole vocabulary: what a store has unless told otherwise."""


def dataset_for(opened: Opened, data_path: Path | None, progress: Callable[[str], None]) -> Manifest | None:
    """The dataset to measure on; None, and a word on it, where the model has none any more.

    Raises:
        DataError: the one asked for is not there.
        TokenizerError: its ids mean something else than the model's.
    """
    folder = data_path
    if folder is None:
        folder = Path(opened.cfg.data.parts[0].path) if opened.trained else None
        if folder is None or not (folder / "manifest.json").is_file():
            progress(f"no losses are measured: there is no dataset at {folder or '--data-path'}")
            return None
    manifest = read_manifest(folder)
    if data_path is None and manifest.kind == PREFERENCE:
        progress(f"no losses are measured: {folder} holds pairs; --data-path names conversations")
        return None
    opened.require_vocabulary(manifest)
    return manifest


def valid_losses(opened: Opened, manifest: Manifest) -> dict[str, float]:
    """The objective's ``loss/*`` over the whole valid split, each a mean over all its supervised tokens, in nats."""
    # Stored conversations hold nothing of what preferences and rewards are learned from.
    imitates = opened.trained is not None and not build_objective(opened.trained).needs.annotations
    objective = None
    if not imitates:
        objective = "token_ce" if manifest.kind == "healing_text" else "span_ce"  # text has no spans
    metrics, cfg = _over_all(opened, manifest, build_objective, objective)
    # How spans are weighted in the total is the run's affair; of other models nobody knows it.
    unknown = () if imitates or cfg.training.objective == "token_ce" else ("loss/total",)
    return {tag: value for tag, value in metrics.items() if tag.startswith("loss/") and tag not in unknown}


def distance(opened: Opened, teacher: Path, manifest: Manifest) -> dict[str, Any]:
    """KL(teacher, model) over the supervised tokens of the whole valid split, both at temperature 1.

    Args:
        opened: the model.
        teacher: as :func:`vpmoe.eval.open_model.open_model` takes it.
        manifest: a dataset of conversations.

    Returns:
        ``teacher``, which one; means over tokens in nats, ``kl`` of whole distributions, ``kl/{analysis,final}`` the
        same by span, ``kl_top_64`` where all but the teacher's 64 likeliest ids are one outcome; ``agreement``, the
        share where no token is likelier to the model than the teacher's first choice.

    Raises:
        CheckpointError, WeightsError: no teacher there.
        TokenizerError: its ids mean something else.
        DataError: the dataset is none of conversations.
    """
    with open_model(teacher) as found:
        found.require_vocabulary(manifest)
        count = min(cfg.model.padded_vocab_size for cfg in (opened.cfg, found.cfg))
        asked = Teacher(count, vocab_size=count)
        asked.open(found.model)
        metrics, _ = _over_all(opened, manifest, lambda cfg: _ToTeacher(SpanCE.from_config(cfg), asked), "span_ce")
        told = {tag: value for tag, value in metrics.items() if tag.startswith(("kl", "agreement"))}
        return {"teacher": found.entry, **told}


@dataclass(frozen=True)
class _ToTeacher(Objective):
    """Measures alone; the teacher is asked batch by batch, since a whole vocabulary at every position of a split is
    more than memory holds."""

    spans: SpanCE
    teacher: Teacher

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        return self.spans.counts(batches)

    def __call__(self, output: ModelOutput, batch: Batch, totals: dict[str, float]) -> ObjectiveResult:
        [asked] = self.teacher([batch])
        ids_BSK, log_p_BSK = (asked[one.name].to(batch.labels.device) for one in (TEACHER_IDS, TEACHER_LOG_P))
        weight_BS = torch.ones_like(log_p_BSK[..., 0])

        def read(count: int | None) -> torch.Tensor:
            ids, log_p = ids_BSK[..., :count], log_p_BSK[..., :count]
            divergence = Divergence(teacher_ids=ids, teacher_log_p=log_p, weight=weight_BS)
            return output.weighted_sum(batch.loss_mask, [divergence])[1][0]

        (kl_N, _, agrees_N), (kl_top_N, _, _) = read(None), read(TOP_K)
        share = 1 / max(totals["tokens/analysis"] + totals["tokens/final"], 1.0)
        means = {"kl": kl_N, f"kl_top_{TOP_K}": kl_top_N, "agreement": agrees_N}
        metrics = {name: values.sum() * share for name, values in means.items()}
        return ObjectiveResult(
            metrics["kl"], {"loss/total": metrics["kl"], **metrics, **means_by_span("kl", kl_N, batch, totals)}
        )


def _over_all(
    opened: Opened, manifest: Manifest, build: Callable[[RunConfig], Objective], objective: str | None
) -> tuple[dict[str, float], RunConfig]:
    """The metrics of an objective over every conversation of the split, and the configuration that it is built of.

    Args:
        build: makes it.
        objective: in place of the one that the model was trained with; None: that.
    """
    data = {"data_path": str(manifest.root), "blend": None, "blend_schedule": None}
    if opened.trained is None:
        data["seq_length"] = manifest.seq_length
    training = {} if objective is None else {"objective": objective}
    changes = {
        name: getattr(opened.cfg, name).model_copy(update=new) for name, new in (("data", data), ("training", training))
    }
    cfg = opened.cfg.model_copy(update=changes)
    dataset = KDDataset(manifest, "valid", seq_length=cfg.data.seq_length)
    # A row holds at least one conversation, so so many global batches hold them all.
    whole = -(-len(dataset) // cfg.training.global_batch_size)
    cfg = cfg.model_copy(update={"evaluation": cfg.evaluation.model_copy(update={"eval_iters": whole})})
    built = build(cfg)
    check_kinds(built, cfg, [manifest])
    batches = ValidSource(Part("valid", dataset), cfg, 0, 1, built.needs.annotations)
    return evaluate(opened.model, built, batches), cfg
