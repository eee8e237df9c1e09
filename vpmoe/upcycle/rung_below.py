"""What a job takes over from the rung below, and how two rungs are compared: logits on the same tokens, in fp32."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_vpmoe.config import RunConfig, geometry_diff
from megatron_vpmoe.runtime.finite import require_finite
from vpmoe.errors import UpcycleError
from vpmoe.hf.convert import Carried, run_state
from vpmoe.upcycle.inputs import Input, checkpoint_of
from vpmoe.upcycle.job import Product, Task
from vpmoe.weights import Weights, megatron_checkpoint
from vpmoe.weights.geometry import conform, process_groups
from vpmoe.weights.streamed_model import streamed_model
from vpmoe.weights.tensors import DTYPES, LazyTensor, LogitDifference, tensor_sha256

if TYPE_CHECKING:
    from vpmoe.upcycle.passages import Passages

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class RungBelow:
    """An input model, opened; no tensor is read yet.

    Attributes:
        cfg: its geometry.
        weights: under Megatron's names.
        carried: what goes with the weights besides.
        assets: tokenizer files.
    """

    cfg: RunConfig
    weights: dict[str, LazyTensor]
    carried: Carried
    assets: list[Path]

    @classmethod
    def open(cls, item: Input) -> RungBelow:
        """The model of what a job made."""
        assert item.cfg is not None
        return cls.of_checkpoint(item.checkpoint, item.cfg)

    @classmethod
    def of_checkpoint(cls, path: Path, cfg: RunConfig) -> RungBelow:
        """The model of a checkpoint directory (``iter_NNNNNNN``), also of a training run's."""
        from megatron_vpmoe.training.checkpoint import ASSETS

        carried = Carried.of(path, cfg)
        return cls(cfg, megatron_checkpoint.read_weights(path), carried, sorted((path / ASSETS).glob("*")))

    def product(self, cfg: RunConfig, weights: Weights) -> Product:
        """New weights with this rung's vocabulary and files."""
        return Product(weights, run_state(cfg, self.carried), self.assets)

    def cast(self, dtype: str) -> dict[str, LazyTensor]:
        """Its weights in the dtype that a job's settings name."""
        return conform(self.weights, self.cfg, DTYPES[dtype], source="the rung below")


def below_and_written(task: Task, folder: Path) -> tuple[RungBelow, dict[str, LazyTensor]]:
    """What a job verifies: its input ``model``, and the weights that were written to ``folder``."""
    written = megatron_checkpoint.read_weights(checkpoint_of(folder))
    return RungBelow.open(task.inputs["model"]), written


def layer_and_name(name: str) -> tuple[int, str] | None:
    """(index from 0, name inside the layer) of a layer's tensor; None for embedding, final norm and output."""
    match = _LAYER_NAME.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def in_layer(index: int, name: str) -> str:
    """The inverse of ``layer_and_name``."""
    return f"decoder.layers.{index}.{name}"


def refuse_other_changes(task: Task, below: RungBelow, allowed: Collection[str]) -> None:
    """Hold the two geometries to differ in fields that the job can change only.

    Args:
        allowed: names of fields of ``model`` and ``moe``.

    Raises:
        UpcycleError: naming every other field that differs.
    """
    found = [
        f"{change.key}: {change.old!r} -> {change.new!r}"
        for change in geometry_diff(below.cfg, task.cfg)
        if change.key.split(".")[1] not in allowed
    ]
    if found:
        raise UpcycleError(
            "the geometries differ in what this job does not change:\n    " + "\n    ".join(found),
            source=task.spec.id,
            remedy="correct the config of one of the two objects",
        )


def refuse_changed(task: Task, before: Weights, after: Weights, names: Mapping[str, str], *, what: str) -> None:
    """Hold tensors to have the same bits, in the dtype that they are written in.

    Args:
        names: name in ``before`` -> name in ``after``.
        what: these tensors are, for the message.

    Raises:
        UpcycleError: naming the first that changed.
    """
    for old, new in names.items():
        written = after[new]
        if tensor_sha256(before[old].to(written.dtype).read()) != tensor_sha256(written.read()):
            moved = "" if old == new else f" on its way to {new}"
            raise UpcycleError(
                f"{old} changed{moved}: {what}", source=task.spec.id, remedy="the conversion is wrong; report it"
            )


def logits_of(cfg: RunConfig, weights: Weights, prompts: Sequence[Sequence[int]], *, source: str) -> list[Tensor]:
    """fp32 logits [length, padded vocabulary] of every prompt; one layer is in memory at a time."""
    from megatron_vpmoe.model.attention.masks import left_padded

    with process_groups(), torch.no_grad():
        model = streamed_model(cfg, weights, source=source)
        logits = model(*left_padded(prompts, torch.device("cpu"))).logits()
    return [row[-len(prompt) :].float() for row, prompt in zip(logits, prompts, strict=True)]


def require_same_logits(found: LogitDifference, tolerance: float, what: str, *, source: str) -> None:
    """Raise :class:`UpcycleError`, beginning with ``what``, if logits differ by more than ``tolerance`` allows."""
    if fault := found.fault(tolerance):
        raise UpcycleError(
            f"{what} moves the logits by {fault}", source=source, remedy="the conversion is wrong; report it"
        )


def text_losses(
    cfg: RunConfig,
    weights: Weights,
    texts: Sequence[Sequence[int]],
    *,
    source: str,
    scored: Sequence[Sequence[bool]] | None = None,
) -> list[Tensor]:
    """Cross-entropies of texts, given as tokens, in nats; the first token of each is not scored.

    One layer is in memory at a time, and logits of one chunk of positions.

    Args:
        scored: of each text as many entries as tokens; entry t says whether token t + 1 counts. None: all do.

    Returns:
        for each text fp32, one a token that counts.
    """
    from megatron_vpmoe.model.attention.masks import left_padded

    with process_groups(), torch.no_grad():
        model = streamed_model(cfg, weights, source=source)
        tokens, layout = left_padded(texts, torch.device("cpu"))
        labels = tokens.roll(-1, dims=1)
        counts = layout.document_id >= 0
        for row, marks in zip(counts, scored or [], strict=scored is not None):
            row[-len(marks) :] = torch.tensor(marks)
        counts[:, -1] = False
        _, losses = model(tokens, layout).cross_entropy(labels, counts, torch.ones(labels.shape))
    return list(require_finite(losses, "the loss", source=source).split(counts.sum(1).tolist()))


def text_loss(cfg: RunConfig, weights: Weights, passages: Passages, *, source: str) -> float:
    """Mean of ``text_losses`` over passages, in nats a token that counts."""
    losses = text_losses(cfg, weights, passages.tokens, source=source, scored=passages.scored)
    return float(torch.cat(losses).double().mean())
