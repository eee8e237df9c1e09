"""Evaluation suites during training: whoever asks the model, the run goes on as if nobody had.

A suite is named in the configuration and opened before weights are allocated; what it needs and does not find is told
then. It computes on all ranks together, between two steps, and gives numbers by name.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from megatron_vpmoe.config.schema_evaluation import EvalSuite
from megatron_vpmoe.errors import ConfigError, DataError, VpmoeError
from megatron_vpmoe.manifest import Manifest, PromptsEntry
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime import device
from megatron_vpmoe.runtime.named import imported
from megatron_vpmoe.runtime.signals import Interrupted, StopRequest
from megatron_vpmoe.training.checkpoint import rng_state, set_rng_state

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_NAMED = "vpmoe.eval.suites.in_training"
"""The module of the suites that a name alone means; the configuration names it, nothing here imports it."""

SECONDS = "seconds"


@dataclass(frozen=True)
class SuiteRequest:
    """What a run asks of a suite.

    Attributes:
        items: at most so many (of each task); None: as many as the suite takes by itself.
        options: of the suite, by name.
        manifest: of the run's first dataset, whose vocabulary is the model's.
        prompts: the messages that its checkpoints will say it is asked with, see :func:`prompts_of`.
        cfg: of the run; its ``data.seq_length`` is the context that the model is trained for.
        source: the field, for messages.
    """

    items: int | None
    options: Mapping[str, Any]
    manifest: Manifest
    prompts: PromptsEntry | None
    cfg: RunConfig
    source: str


Suite = Callable[[VPModel, StopRequest], Mapping[str, float]]
"""Asks the bare model, in evaluation mode and without gradients; a collective of all ranks, with the same numbers on
each. What has to be seen first has no slash in its name. Ends in ``Interrupted`` on all ranks where a stop is asked."""


@dataclass(frozen=True)
class OpenedSuite:
    """A suite, and how often it is asked."""

    part: EvalSuite
    suite: Suite

    def ask(self, model: VPModel, stop: StopRequest) -> dict[str, float]:
        """Its numbers, and ``seconds``; a collective.

        Raises:
            Interrupted: a rank was asked to stop.
            DataError: it fails, or returns what are no numbers.
        """
        began = time.perf_counter()
        try:
            with undisturbed(model):
                found = {str(tag): float(value) for tag, value in self.suite(model, stop).items()}
        except (VpmoeError, Interrupted):
            raise
        except Exception as error:  # of others' code: whatever it is, it is theirs to mend
            raise DataError(
                f"the suite {self.part.label} failed with {type(error).__name__}: {error}",
                source=f"evaluation.eval_suites: {self.part.suite}",
                remedy="a suite returns numbers by name, whatever the model says",
            ) from error
        device.finish()
        return {**found, SECONDS: time.perf_counter() - began}


def prompts_of(manifests: Sequence[Manifest]) -> PromptsEntry | None:
    """System and developer messages of the first dataset that has any: the model learns to be asked so."""
    return next((manifest.prompts for manifest in manifests if manifest.prompts), None)


def open_suites(cfg: RunConfig, manifests: Sequence[Manifest]) -> list[OpenedSuite]:
    """Every suite of ``evaluation.eval_suites``, ready to be asked; ``manifests`` are those of the run's datasets.

    Raises:
        ConfigError: a suite cannot be had, or does not take its options.
        DataError, TokenizerError: what it asks is not there, or has no form in the vocabulary.
    """
    return [OpenedSuite(part, _opened(part, cfg, manifests)) for part in cfg.evaluation.eval_suites or ()]


def _opened(part: EvalSuite, cfg: RunConfig, manifests: Sequence[Manifest]) -> Suite:
    source = f"evaluation.eval_suites: {part.label}"
    name = part.suite if ":" in part.suite else f"{_NAMED}:{part.suite}"
    remedy = "name a suite that docs/eval_suite.md lists, or module:function in a module that Python finds (PYTHONPATH)"
    opener = imported(name, "suite", source=source, remedy=remedy)
    if not callable(opener):
        raise ConfigError(f"{name} is no suite: {opener!r}", source=source, remedy=remedy)
    suite = opener(SuiteRequest(part.items, part.options, manifests[0], prompts_of(manifests), cfg, source))
    if not callable(suite):
        raise ConfigError(f"{name} gave no suite but {suite!r}", source=source, remedy="return a function of a model")
    return cast(Suite, suite)


@contextlib.contextmanager
def undisturbed(model: VPModel) -> Iterator[None]:
    """Evaluation mode, without gradients; afterwards buffers (expert biases, loads), training mode and all random
    generators are as before."""
    was_training, buffers = model.training, [(buffer, buffer.clone()) for buffer in model.buffers()]
    generators, of_python, of_numpy = rng_state(), random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for buffer, before in buffers:
            buffer.copy_(before)
        set_rng_state(generators)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
