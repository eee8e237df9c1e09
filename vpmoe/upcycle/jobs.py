"""Every job by its name; a module is imported when its job is asked for."""

from __future__ import annotations

import importlib

from vpmoe.errors import UpcycleError
from vpmoe.upcycle.job import Job

_JOBS = {
    "vocabulary": "vpmoe.upcycle.vocabulary:Vocabulary",
    "depth": "vpmoe.upcycle.depth:Depth",
    "experts": "vpmoe.upcycle.experts:Experts",
    "morph": "vpmoe.upcycle.morph:Morph",
    "shape": "vpmoe.upcycle.shape:Shape",
    "import_qwen3": "vpmoe.upcycle.import_qwen3:ImportQwen3",
    "pretrain": "vpmoe.upcycle.training_jobs:Pretrain",
    "heal": "vpmoe.upcycle.training_jobs:Heal",
}


def job_of(name: str, *, source: str) -> Job:
    """The job of a name; raises ``UpcycleError`` where there is none."""
    if name not in _JOBS:
        raise UpcycleError(f"no job {name!r}", source=source, remedy=f"one of {', '.join(_JOBS)}")
    module, attribute = _JOBS[name].split(":")
    return getattr(importlib.import_module(module), attribute)()
