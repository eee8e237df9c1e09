"""The suites as a training asks them (``evaluation.eval_suites``): read and encoded once, before weights are allocated.

A function here is a suite by its name; numbers have the names of a report, ``<task>/<number>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.data.batch import Span
from megatron_vpmoe.errors import ConfigError, TokenizerError
from megatron_vpmoe.manifest import Manifest
from megatron_vpmoe.runtime.signals import StopRequest
from megatron_vpmoe.training.suites import Suite, SuiteRequest
from vpmoe.eval.asking import form_for
from vpmoe.eval.suites import canaries as exact
from vpmoe.eval.suites import text as texts
from vpmoe.eval.suites.core8 import Items, Settings
from vpmoe.eval.suites.fetch import bundle_folder
from vpmoe.eval.suites.likelihood import measure
from vpmoe.eval.suites.suite_options import CanaryOptions, Core8Options, TextOptions
from vpmoe.tokenizer.from_dataset import load_tokenizer

if TYPE_CHECKING:
    from megatron_vpmoe.model.gpt import VPModel

_CONSTANT = ("chance", "seconds")


def core8(request: SuiteRequest) -> Suite:
    """CORE-8, or other tasks of a bundle that is there already; ``items`` of each task, without them those of smoke."""
    options = Core8Options.of(request.options, request.source)
    settings = Settings.read(options.config)
    folder = options.bundle or bundle_folder(settings.bundle, say=None)
    limit = settings.limit("smoke") if request.items is None else request.items
    items = Items.read(folder, options.tasks or settings.tasks, limit, settings)
    tokenizer, context = load_tokenizer(request.manifest.root), options.context or request.cfg.data.seq_length
    asked = {name: items.asked(name, tokenizer, context) for name in items.of_task}
    rows = options.batch_size or settings.batch_size

    def ask(model: VPModel, stop: StopRequest) -> dict[str, float]:
        entries = {
            name: items.score(model, name, of_task, rows, quiet=True, stop=stop)[0] for name, of_task in asked.items()
        }
        whole = set(settings.tasks) <= entries.keys()
        name, of = ("core8_centered_mean", settings.tasks) if whole else ("centered_mean", tuple(entries))
        return {name: sum(entries[task]["centered"] for task in of) / len(of), **told(entries)}

    return ask


def canaries(request: SuiteRequest) -> Suite:
    """Canaries, as the run's data asks: in conversations with its messages, or as plain text; ``items`` of a level."""
    options = CanaryOptions.of(request.options, request.source)
    chosen, settings = options.chosen(request.items), exact.Settings.read(options.config)
    exact.known(chosen)
    form = form_for(load_tokenizer(request.manifest.root), request.prompts, plain=options.plain)
    settings = settings.model_copy(update=chosen.instead)
    asked = exact.Canaries.of(form, chosen, settings, options.context or request.cfg.data.seq_length)

    def ask(model: VPModel, stop: StopRequest) -> dict[str, float]:
        numbers = asked.numbers(asked.records(asked.answers(model, quiet=True, stop=stop)))
        return {name: value for name, value in numbers.items() if isinstance(value, float)} | told(numbers["tasks"])

    return ask


def text(request: SuiteRequest) -> Suite:
    """Likelihoods of texts, or of a dataset of the run's vocabulary; ``items`` are documents."""
    if request.cfg.parallel.pipeline_model_parallel_size > 1:
        raise ConfigError(
            "likelihoods of texts are not computed over pipeline stages",
            source=request.source,
            remedy="leave the suite out, or train with one stage",
        )
    asked = TextOptions.of(request.options, request.source).asked(request.items)
    measured, tokenizer = texts.read(asked), load_tokenizer(request.manifest.root)
    if isinstance(measured, Manifest) and measured.tokenizer.identity() != tokenizer.identity:
        raise TokenizerError(
            f"the run has the vocabulary {tokenizer.name} of {tokenizer.vocab_size} tokens, the dataset "
            f"{measured.tokenizer.name} of {measured.tokenizer.vocab_size}, and they differ",
            source=f"{request.source}: {measured.path}",
            remedy="name a dataset of the run's vocabulary, or texts",
        )
    passages, _ = texts.passages_of(tokenizer, measured, asked, request.cfg.data.seq_length)

    def ask(model: VPModel, stop: StopRequest) -> dict[str, float]:
        sums = measure(model, passages, batch_size=asked.batch_size, spans=len(Span), check=stop.check())
        return told(texts.tasks_of(sums, asked))

    return ask


def told(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of tasks that tell one checkpoint from another: shares and means, not counts."""
    return {
        f"{task}/{name}": value
        for task, entry in entries.items()
        for name, value in entry.items()
        if isinstance(value, float) and name not in _CONSTANT
    }
