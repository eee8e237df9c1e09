"""Rules of what is measured during a run."""

from __future__ import annotations

from collections import Counter

from megatron_vpmoe.config.rule import Rule, refuse

REFUSED: tuple[Rule, ...] = (
    refuse("eval_suites", "names none; null asks none", lambda c: c.eval_suites == []),
    refuse(
        "eval_suites",
        "two are called {suite} in metrics; give one another name",
        lambda c: [
            {"suite": name} for name, count in Counter(part.label for part in c.eval_suites or ()).items() if count > 1
        ],
    ),
)
