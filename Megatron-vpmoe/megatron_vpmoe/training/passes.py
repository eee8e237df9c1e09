"""What is measured between two steps: validation, samples, evaluation suites; and what of it a stop has left undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from megatron_vpmoe.metrics import MetricStream, Record
from megatron_vpmoe.runtime.signals import StopRequest
from megatron_vpmoe.training.evaluate import Validation
from megatron_vpmoe.training.progress import Progress
from megatron_vpmoe.training.resources import timed
from megatron_vpmoe.training.run import Run
from megatron_vpmoe.training.samples import SampleWriter
from megatron_vpmoe.training.suites import OpenedSuite

_SAMPLES = "samples"


class Passes:
    """The passes of a run by name: "valid" or "valid/<dataset>", "samples", "eval/<suite>"; a collective to construct.

    Args:
        run: at its step; of ``run.left`` what was measured before is measured again.
        metrics: where numbers go.
        progress: told of them.
        stop: asked in each pass.
    """

    def __init__(self, run: Run, metrics: MetricStream, progress: Progress, stop: StopRequest) -> None:
        self._run, self._metrics, self._progress, self._stop = run, metrics, progress, stop
        evaluation = run.cfg.evaluation
        kept = run.iteration - (_SAMPLES in run.left)
        samples = SampleWriter(run.valid_dataset, run.cfg, run.directory / "samples.jsonl", resume_step=kept)
        self._each: dict[str, tuple[int | None, Callable[[], None]]] = {
            prefix: (evaluation.eval_interval, partial(self._validate, prefix, measure))
            for prefix, measure in run.valid.items()
        }
        self._each[_SAMPLES] = evaluation.sample_interval, lambda: samples.write(run.model, run.iteration, stop)
        for each in run.suites:
            self._each[f"eval/{each.part.label}"] = each.part.interval, partial(self._ask, each)

    def left(self) -> list[str]:
        """Of the run's step: all but samples before the first one, where ``eval_at_start`` asks for it."""
        if self._run.cfg.evaluation.eval_at_start and self._run.iteration == 0:
            return [name for name in self._each if name != _SAMPLES]
        return [name for name in self._each if name in self._run.left]

    def due(self, last: int) -> list[str]:
        """After the run's step; ``last``: of the run."""
        return [name for name, (interval, _) in self._each.items() if is_due(self._run.iteration, interval, last)]

    def make(self, names: Iterable[str]) -> None:
        """Make these, one by one; a collective. What is left stands in ``run.left``.

        Raises:
            Interrupted: a rank was asked to stop.
        """
        self._run.left = [*names]
        while self._run.left:
            _, measure = self._each[self._run.left[0]]
            measure()
            self._run.left.pop(0)

    def _validate(self, prefix: str, measure: Validation) -> None:
        with timed(self._metrics, self._run.iteration, f"evaluation/{prefix}"):
            valid = measure(self._stop)
        self._metrics.log(self._run.iteration, {f"{prefix}/{tag}": value for tag, value in valid.items()})
        self._progress.evaluated(self._run.iteration, valid, prefix)

    def _ask(self, suite: OpenedSuite) -> None:
        found, label = suite.ask(self._run.model, self._stop), suite.part.label
        self._metrics.log(self._run.iteration, {f"eval/{label}/{tag}": value for tag, value in found.items()})
        self._progress.asked(self._run.iteration, label, found)


def without(names: Sequence[str], step: int, records: Sequence[Record]) -> Sequence[Record]:
    """Records but for those of these passes at ``step``, and of where it lies: all of them will come again."""
    if not names:
        return records
    begins = tuple(f"{name}/" for name in (*names, "elapsed"))
    whole = {f"ms/evaluation/{name}" for name in names}
    return [one for one in records if one.step != step or not (one.tag.startswith(begins) or one.tag in whole)]


def is_due(step: int, interval: int | None, last: int) -> bool:
    """Every ``interval`` steps, and at the last one; never for None."""
    return interval is not None and (step % interval == 0 or step == last)
