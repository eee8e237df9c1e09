"""How likely a model finds continuations: what stands before several of them is computed once, for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_vpmoe.runtime.signals import Interrupted, StopRequest

if TYPE_CHECKING:
    from megatron_vpmoe.model.gpt import VPModel


@dataclass(frozen=True)
class Request:
    """A continuation of a context.

    Attributes:
        context: token ids, at least one.
        given: the continuation's, at least one.
        scored: so many of its last tokens count.
    """

    context: tuple[int, ...]
    given: tuple[int, ...]
    scored: int

    @classmethod
    def of(cls, ids: Sequence[int], parting: int, scored: int, longest: int | None) -> Request:
        """A sequence whose first ``parting`` ids are the context; of more than ``longest`` ids the last count."""
        dropped = 0 if longest is None else max(0, len(ids) - longest)
        ids, parting = ids[dropped:], max(1, parting - dropped)
        return cls(tuple(ids[:parting]), tuple(ids[parting:]), min(scored, len(ids) - parting))


@dataclass(frozen=True)
class Likelihood:
    """What the model says of a continuation.

    Attributes:
        log_p: sum of log p over its scored tokens, in nats.
        tokens: their number.
        greedy: each of them is the likeliest where it stands.
    """

    log_p: float
    tokens: int
    greedy: bool

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.log_p / self.tokens


def likelihoods(
    model: VPModel,
    requests: Sequence[Request],
    *,
    rows: int,
    watch: Callable[[int], None] = lambda request: None,
    stop: StopRequest | None = None,
) -> list[Likelihood]:
    """Score each continuation behind its context; a collective of all ranks, which share the contexts out.

    The longest contexts come first, so rows that are decoded together are of like length, and the memory that the cache
    takes is taken at once. Neither order nor ranks nor rows change a number by more than rounding.

    Args:
        model: the bare model.
        requests: those with the same context share its forward pass.
        rows: continuations that a rank scores at once.
        watch: told the place of each request as it is done, of this rank's share.
        stop: asked before each token.

    Raises:
        Interrupted: a rank was asked to stop.
    """
    from megatron_vpmoe.generation.engine import generate
    from megatron_vpmoe.generation.prompts import Completion, Prompt
    from megatron_vpmoe.generation.sampling import SamplingOptions

    if not requests:
        return []
    behind: dict[tuple[int, ...], list[int]] = {}
    for place, request in enumerate(requests):
        behind.setdefault(request.context, []).append(place)
    places = [behind[context] for context in sorted(behind, key=len, reverse=True)]
    prompts = [
        Prompt(requests[group[0]].context, identity=0, given=[requests[place].given for place in group])
        for group in places
    ]

    def done(completion: Completion) -> None:
        if completion.finish is not None:
            watch(places[completion.place][completion.sample])

    asked_to_stop = None if stop is None else stop.is_requested
    completions = generate(model, prompts, SamplingOptions(1, ()), rows=rows, watch=done, stop=asked_to_stop)
    if stop is not None and stop.agreed():
        raise Interrupted
    found: dict[int, Likelihood] = {}
    for one in completions:
        place = places[one.place][one.sample]
        last = slice(-requests[place].scored, None)
        greedy = all(log_q == 0 for log_q in one.as_sampled[last])
        found[place] = Likelihood(sum(one.untempered[last]), requests[place].scored, greedy)
    return [found[place] for place in range(len(requests))]
