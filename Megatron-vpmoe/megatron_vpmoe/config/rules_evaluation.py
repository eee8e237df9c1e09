"""Rules of what is measured during a run."""

from __future__ import annotations

from megatron_vpmoe.config.rule import Rule, refuse, twice

REFUSED: tuple[Rule, ...] = (
    refuse("eval_suites", "names none; null asks none", lambda c: c.eval_suites == []),
    refuse(
        "eval_suites",
        "two are called {suite} in metrics; give one another name",
        lambda c: twice("suite", c.eval_suites),
    ),
)
