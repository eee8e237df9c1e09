"""The section of what is measured during a run: validation, samples and evaluation suites."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from megatron_vpmoe.config.schema_section import BOUND, Count, Name, Section, Several, Size, Text


def _is_suite(value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*|[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise PydanticCustomError(BOUND, "must be the name of a suite, or module:function")
    return value


Option = bool | int | float | Text | Several[Text] | None


class AskedSuite(Section):
    """An evaluation suite, and what it is asked with."""

    suite: Annotated[Text, AfterValidator(_is_suite)]
    """Name ("core8", "canaries", "text"), or "module:function": takes a megatron_vpmoe.training.suites.SuiteRequest and
    returns what is called with the model and a StopRequest, and gives numbers by name."""
    items: Size | None = None
    """At most so many items (of each task, where there are several); null: as many as the suite takes by itself."""
    name: Name | None = None
    """What metrics call it, eval/<name>/...; null: its suite."""
    options: dict[Name, Option] = Field(default_factory=dict, max_length=64)
    """What else the suite takes, by name; docs/eval_suite.md has those of ours."""

    @property
    def label(self) -> str:
        """Its name, after the default."""
        return self.name or self.suite.rpartition(":")[2]


class EvalSuite(AskedSuite):
    """One that a run is asked."""

    interval: Count
    """Iterations between two times that it is asked; and once after the last iteration."""


class EvaluationSection(Section):
    """Validation, samples and evaluation suites during the run."""

    eval_interval: Count | None = None
    """Iterations between validation passes, and one after the last iteration; null: never."""
    eval_at_start: bool = False
    """Validate before the first iteration too: what a run's initial weights give, at step 0 of the metrics."""
    eval_iters: Count = 10
    """Global batches in one validation pass."""
    sample_interval: Count | None = None
    """Iterations between generated samples; null: never."""
    sample_prompts: Size = 4
    """Validation conversations whose prompt is answered, from the first on."""
    sample_max_new_tokens: Size = 256
    """Longest generated answer, in tokens."""
    eval_suites: Several[EvalSuite] | None = None
    """Evaluation suites to ask, as a list of {suite, interval, items, name, options}; with eval_at_start before the
    first iteration too. null: none."""
