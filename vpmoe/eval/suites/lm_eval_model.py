"""Any model that ``vpmoe`` opens, as a model of lm-eval: its tasks run on our own weights, without an export.

Texts are encoded as lm-eval's own model of HF directories does: blanks at the end of a context belong to what follows,
context and continuation are encoded together, nothing stands before them but for an empty context, and what is too
long loses its beginning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

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
        output = output or suite_report.default_output(SUITE, opened)
        distributed.from_rank_0(lambda: suite_report.check_writable(output, overwrite=overwrite))
        lm = VpmoeLM(opened, batch_size, context)
        run = cast(Any, simple_evaluate)  # a decorator hides its signature
        found = run(lm, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=1000)
        entries = {name: _entry(numbers, found["n-samples"].get(name)) for name, numbers in found["results"].items()}
        settings = {"limit": limit, "context": context or opened.context or CONTEXT, "bf16": opened.cfg.training.bf16}
        report = {
            **suite_report.head(SUITE, opened, settings),
            "tasks": entries,
            "wall_seconds": round(time.perf_counter() - started, 2),
        }
        suite_report.write(output, report, [])
    say(f"{output} written")
    return report


def _entry(numbers: dict[str, Any], samples: dict[str, int] | None) -> dict[str, Any]:
    """A task's metrics by lm-eval's names, and the accuracy under that of our reports where there is one."""
    metrics = {name: value for name, value in numbers.items() if isinstance(value, float)}
    return {"accuracy": metrics.get("acc,none"), "n": (samples or {}).get("effective"), **metrics}


def summary_lines(report: dict[str, Any]) -> str:
    """The report as a few lines."""
    return "\n".join(
        f"{task:<24}{name} {value:.4f}"
        for task, entry in report["tasks"].items()
        for name, value in entry.items()
        if isinstance(value, float) and "stderr" not in name and name != "accuracy"
    )
