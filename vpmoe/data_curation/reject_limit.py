"""How many rows of a source may be rejected, judged while they are read and exactly at the end.

While rows come, the count alone says little: of a source with half as many bad rows as are allowed, a fixed count
stops a third. The test here is a mixture of likelihood ratios (Robbins 1970): for a source whose true rate is at most
the limit it is a non-negative supermartingale that begins at 1, so by Ville's inequality the chance that it *ever*
reaches ``1 / alpha``, however long the source is and however often one looks, is at most ``alpha``. It takes rows to be
bad independently of one another; a damaged block can stop a source wrongly, which costs a command that goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vpmoe.errors import DataError

ALPHA = 1e-6
_FIRST_LOOK = 1000
"""Rows before which nothing is judged: a few bad rows at the very beginning say nothing of a long source."""
_RATIOS = (1.05, 1.1, 1.2, 1.4, 1.7, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0)
"""True rates that the test looks for, as multiples of the limit, all with the same weight."""


@dataclass(frozen=True)
class RejectLimit:
    """The largest fraction of rows that may be rejected.

    It decides whether the work goes on, not what comes out of it, so it belongs in no key: after a refusal the same
    command with a higher limit goes on from there.

    Attributes:
        fraction: above which the source is refused; None: never.
        alpha: chance that a source within the limit is stopped before its end.
    """

    fraction: float | None
    alpha: float = ALPHA

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise DataError(f"{self.fraction} is no fraction", source="--max-reject-fraction", remedy="use 0 to 1")

    def exceeded(self, rejected: int, seen: int, *, total: int | None = None, final: bool = False) -> bool:
        """Whether the source is to be refused.

        Args:
            rejected: rows rejected so far, of ``seen``.
            seen: rows looked at so far, the rejected among them.
            total: rows of the whole source where that is known: more rejects than it may have are enough.
            final: all rows were seen: the counts are compared exactly.
        """
        limit = self.fraction
        if limit is None or rejected <= limit * seen:
            return False
        if final or limit == 0 or (total is not None and rejected > limit * total):
            return True
        return seen >= _FIRST_LOOK and self._log_evidence(limit, rejected, seen) >= -math.log(self.alpha)

    def check(
        self,
        rejected: Mapping[str, int],
        seen: int,
        *,
        source: str,
        total: int | None = None,
        final: bool = False,
    ) -> None:
        """Refuse a source that is over the limit.

        Args:
            rejected: reason -> rows rejected for it.
            source: where the rejected rows are listed.
            seen, total, final: see :meth:`exceeded`.

        Raises:
            DataError: with counts and reasons.
        """
        count = sum(rejected.values())
        if not self.exceeded(count, seen, total=total, final=final):
            return
        reasons = ", ".join(f"{reason} {rows}" for reason, rows in sorted(rejected.items(), key=lambda item: -item[1]))
        raise DataError(
            f"{count} of {seen} rows were rejected, more than the fraction {self.fraction} ({reasons})",
            source=source,
            remedy="look at the rows named there and mend the source; or give the same command with a higher "
            "--max-reject-fraction or --no-strict: it goes on from here",
        )

    @staticmethod
    def _log_evidence(limit: float, rejected: int, seen: int) -> float:
        """Log of the mixture of likelihood ratios of the looked-for rates against ``limit``."""
        rates = [rate for ratio in _RATIOS if (rate := limit * ratio) < 1]
        if not rates:
            rates = [(1 + limit) / 2]
        logs = [
            rejected * math.log(rate / limit) + (seen - rejected) * (math.log1p(-rate) - math.log1p(-limit))
            for rate in rates
        ]
        most = max(logs)
        return most + math.log(sum(math.exp(value - most) for value in logs) / len(logs))
