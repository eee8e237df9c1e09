"""Any model that ``vpmoe`` opens, as a model of lm-eval: its tasks run on our own weights, without an export.

lm-eval looks for no models outside of itself, so its command line, too, is called by this module, which registers ours:
``python -m vpmoe.eval.suites.lm_eval_model run --model vpmoe --model_args pretrained=runs/quickstart --tasks ...``.

Texts are encoded as lm-eval's own model of HF directories does: blanks at the end of a context belong to what follows,
context and continuation are encoded together, nothing stands before them but for an empty context, and what is too
long loses its beginning.
"""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from megatron_vpmoe.files import sha256_of_json
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.prompts import Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.runtime import distributed
from vpmoe.errors import DataError
from vpmoe.eval.asking import stop_ids
from vpmoe.eval.open_model import Opened, open_model
from vpmoe.eval.suites import suite_report
from vpmoe.eval.suites.likelihood import Passage, measure
from vpmoe.eval.suites.likelihoods import Request, likelihoods

SUITE, CONTEXT, NEW_TOKENS = "lm_eval", 2048, 256
_ARGUMENTS = {"pretrained": str, "context": int, "bf16": bool, "batch_size": int}
_SHARES = ("acc", "exact_match")
"""lm-eval's metrics that are the share of items answered rightly."""


class VpmoeLM(LM):
    """A model, opened.

    Args:
        opened: it has to stay open.
        batch_size: sequences that a process has in work at once.
        context: tokens of a sequence; None: as the model was trained, else 2048.
    """

    def __init__(self, opened: Opened, batch_size: int = 32, context: int | None = None) -> None:
        super().__init__()
        self._model, self._tokenizer, self._rows = opened.model, opened.tokenizer, batch_size
        self.context = context or opened.context or CONTEXT

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """Open the model that lm-eval's command line names; it stays open as long as what is returned.

        Args:
            arg_dict: ``--model_args``: ``pretrained`` is a run, a checkpoint, an object of a ladder or an HF directory;
                ``context`` and ``bf16`` as ``vpmoe eval lm-eval`` has them.
            additional_config: lm-eval's own options, of which ``batch_size`` counts. ``device`` cannot: lm-eval says
                cuda:0 where nobody says anything, and ours is found as everywhere.

        Raises:
            DataError: an argument is missing, unknown or of another kind.
            CheckpointError, WeightsError, TokenizerError: as :func:`vpmoe.eval.open_model.open_model`.
        """
        given = dict(arg_dict)
        if (rows := (additional_config or {}).get("batch_size")) is not None:
            given["batch_size"] = int(rows) if str(rows).isdecimal() else rows
        for name, value in given.items():
            if name not in _ARGUMENTS or type(value) is not _ARGUMENTS[name]:
                known = ", ".join(f"{known} ({kind.__name__})" for known, kind in _ARGUMENTS.items())
                fault = f"{name}={value!r} is no argument of a model of vpmoe"
                raise DataError(fault, source="--model_args, --batch_size", remedy=f"it takes {known}")
        if "pretrained" not in given:
            raise DataError("no model is named", source="--model_args", remedy="pretrained=WHERE")
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(open_model(Path(given["pretrained"]), bf16=given.get("bf16")))
            model = cls(opened, given.get("batch_size", 32), given.get("context"))
            weakref.finalize(model, stack.pop_all().close)
        return model

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """The same of ``name=value,name=value``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode_ordinary(text).tolist()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation: log p, and whether greedy decoding would give it."""
        asked = [self._request(*instance.args) for instance in requests]
        return [(one.log_p, one.greedy) for one in likelihoods(self._model, asked, rows=self._rows)]

    def _request(self, context: str, continuation: str) -> Request:
        blanks = context[len(context.rstrip()) :]
        context, continuation = context.removesuffix(blanks), blanks + continuation
        before = self._ids(context) or [self._tokenizer.eod_id]
        whole = self._ids(context + continuation)
        after = whole[len(before) :] if context else whole
        if not after:
            what = f"the continuation {continuation!r} adds no token to its context"
            raise DataError(what, source="lm-eval's task", remedy="leave the task out, or mend its targets")
        return Request.of([*before, *after], len(before), len(after), self.context + 1)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of each text: log p of all of its tokens, the first behind the end of a document."""
        passages = []
        for number, instance in enumerate(requests):
            ids = self._ids(instance.args[0])
            windows = get_rolling_token_windows(ids, self._tokenizer.eod_id, self.context, 1)
            for before, after in map(make_disjoint_window, windows):
                whole = np.array([*before, *after], dtype=np.int64)
                scored = np.arange(1, len(whole)) >= len(before)
                nothing = np.zeros(len(scored), dtype=np.int64)
                passages.append(Passage(number, whole[:-1], whole[1:], scored, nothing, nothing, nothing))
        if not passages:
            return [0.0] * len(requests)
        nats = measure(self._model, passages, batch_size=self._rows).documents[0, :, 0]
        return [-float(nats[number]) if number < len(nats) else 0.0 for number in range(len(requests))]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """A completion of each context, up to the first of its stop texts; requests with the same settings together."""
        found: dict[int, str] = {}
        asked: list[Any] = [instance.args for instance in requests]
        groups: dict[str, list[int]] = {}
        for place, (_, settings) in enumerate(asked):
            groups.setdefault(repr(sorted(settings.items())), []).append(place)
        for places in groups.values():
            texts = self._complete([asked[place][0] for place in places], asked[places[0]][1])
            found |= dict(zip(places, texts, strict=True))
        return [found[place] for place in range(len(asked))]

    def _complete(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        limit = int(settings.get("max_gen_toks", NEW_TOKENS))
        room = self.context - limit
        if room < 1:
            what = f"{limit} new tokens leave no room in a context of {self.context}"
            raise DataError(what, source="max_gen_toks", remedy="--context widens it")
        stops = [text.encode() for text in until]
        # A token that holds a whole stop text ends the generation; what comes in several tokens is cut off afterwards.
        pieces = enumerate(self._tokenizer.pieces())
        ends = {row for row, piece in pieces if any(stop in piece for stop in stops)} | set(stop_ids(self._tokenizer))
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        options = SamplingOptions(limit, tuple(sorted(ends)), temperature=temperature)
        prompts = [Prompt((self._ids(text) or [self._tokenizer.eod_id])[-room:]) for text in contexts]
        texts = []
        for completion in generate(self._model, prompts, options, rows=self._rows):
            text = self._tokenizer.decode(one for one in completion.ids if one < self._tokenizer.first_special_id)
            texts.append(text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))])
        return texts


register_model("vpmoe")(VpmoeLM)


def evaluate(
    path: Path,
    tasks: Sequence[str],
    *,
    include_path: Path | None,
    limit: int | None,
    batch_size: int,
    context: int | None,
    bf16: bool | None,
    output: Path | None,
    overwrite: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run lm-eval's tasks on the model at ``path``, write the report, and return it; a collective of all ranks.

    Raises:
        CheckpointError, DataError, TokenizerError: something named does not exist or does not fit.
        NotOursError: something else lies where the report belongs.
    """
    started = time.perf_counter()
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = set(manager.match_tasks(list(tasks)))
    if unknown := [name for name in tasks if name not in known]:
        raise DataError(
            f"lm-eval has no task {unknown[0]!r}", source="--tasks", remedy="--include-path names a folder of your own"
        )
    with open_model(path, bf16=bf16) as opened:
        output = suite_report.output_for(SUITE, opened, output, overwrite=overwrite)
        lm = VpmoeLM(opened, batch_size, context)
        run = cast(Any, simple_evaluate)  # a decorator hides its signature
        found = run(lm, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=1000)
        # lm-eval tells the first process of a machine alone; it is the one that writes.
        report, items = distributed.from_rank_0(lambda: _report(opened, lm, found, limit))
        report["wall_seconds"] = round(time.perf_counter() - started, 2)
        suite_report.write(output, report, items)
    say(f"{output} written")
    return report


def _report(
    opened: Opened, lm: VpmoeLM, found: Mapping[str, Any], limit: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report and its items, of what lm-eval found."""
    settings = {"limit": limit, "context": lm.context, "bf16": opened.cfg.training.bf16}
    entries, bundle, items = {}, {}, []
    for name, numbers in found["results"].items():
        samples = found["samples"].get(name, ())
        hashes = [[sample[f"{part}_hash"] for part in ("doc", "prompt", "target")] for sample in samples]
        bundle[name] = {"version": found["versions"].get(name), "sha256": sha256_of_json(hashes)}
        metrics = {metric: value for metric, value in numbers.items() if isinstance(value, float)}
        right = _right(metrics, samples)
        accuracy = {}
        if right:
            total, n = sum(right.values()), len(right)
            accuracy = {"accuracy": total / n, "interval": suite_report.wilson(total, n)}
        entries[name] = {**accuracy, "n": found["n-samples"].get(name, {}).get("effective"), **metrics}
        items += [{"task": name, "item": item, "correct": value} for item, value in right.items()]
    return {**suite_report.head(SUITE, opened, settings), "bundle": bundle, "tasks": entries}, items


def _right(metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Of each document how far it was answered rightly; nothing for tasks that have no share of right answers."""
    for metric, value in metrics.items():
        name, _, answers = metric.partition(",")
        if name in _SHARES:
            mine = {one["doc_id"]: float(one[name]) for one in samples if one["filter"] == answers and name in one}
            if mine and math.isclose(sum(mine.values()) / len(mine), value, abs_tol=1e-9):
                return mine
    return {}


def summary_lines(report: dict[str, Any]) -> str:
    """The report as a few lines."""
    return "\n".join(
        f"{task:<24}{name} {value:.4f}"
        for task, entry in report["tasks"].items()
        for name, value in entry.items()
        if isinstance(value, float) and "stderr" not in name and name != "accuracy"
    )


if __name__ == "__main__":
    cli_evaluate()
