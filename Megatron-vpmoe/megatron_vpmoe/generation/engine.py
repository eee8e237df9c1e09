"""The engine: prompts wait, take the rows that are free, grow by a token a step, and leave when they end.

Prompts share nothing and wait for nothing: each row is at its own position, and no padding is computed on. A prompt but
for its last token goes through the model's own forward pass, several prompts packed into one row, once for all samples
of it; the last token is a row's first step.

Prompts are shared out over data-parallel ranks, and every rank gets all completions. With experts spread over ranks a
forward pass is a collective: the ranks then agree on what comes next, fill up to the largest, and end together.

Host synchronisations in a step: for the chosen tokens, recorded routing and that agreement. Memory beside the weights:
the cache (`kv_cache`), one pack's keys and values, fp32 logits [rows, V], on a CPU a copy of large weights (`linear`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_vpmoe.config.memory import DECODED_ROWS
from megatron_vpmoe.generation.grammar import AllowedTokens, TokenGrammar
from megatron_vpmoe.generation.kv_cache import Past
from megatron_vpmoe.generation.prompts import Completion, Prompt, budgets_of
from megatron_vpmoe.generation.sampling import SamplingOptions, choose
from megatron_vpmoe.generation.state_decoder import decoder_of
from megatron_vpmoe.generation.uncached import WholeTexts
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.replay import recording
from megatron_vpmoe.model.tensor_parallel import whole_sequences
from megatron_vpmoe.runtime import stages
from megatron_vpmoe.runtime.counter import draw_key, uniform
from megatron_vpmoe.runtime.exchange import Exchange

ROWS = DECODED_ROWS
"""Completions that are decoded at once."""

_PACKED = 512
"""Tokens of prompts that share a forward pass; a longer prompt has one of its own. Attention there is quadratic."""

_PACKED_FROM = 32
"""Steps, if no row stops early, from which a second layout of the weights saves more time than making it takes."""


@torch.no_grad()
def generate(
    model: VPModel,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    *,
    rows: int = ROWS,
    grammar: TokenGrammar | None = None,
    weight_version: int = 0,
    watch: Callable[[Completion], None] | None = None,
    stop: Callable[[], bool] | None = None,
    record_routing: bool = False,
    exchange: Exchange | None = None,
    cached: bool = True,
) -> list[Completion]:
    """Continue each prompt until a stop token or the limit.

    Args:
        model: the bare model; its training mode is restored afterwards. A collective of all ranks of the job: all pass
            the same prompts and get the same completions.
        prompts: at least one.
        options: how to sample, and how many completions of each prompt.
        rows: completions that a rank decodes at once: the memory of the cache.
        grammar: sample only what it accepts; it then says where a completion ends, and stop ids do not.
        weight_version: of the model, noted in the completions.
        watch: called after each new token, with the completion that got it, of this rank's share of the prompts.
        stop: asked before each token; once a rank's says so, what is unfinished is given up.
        record_routing: completions tell which experts tokens went to, or a mixture's weights; one pipeline stage.
        exchange: by which completions are gathered; None: by the run's groups.
        cached: keep keys and values from step to step; if not, each token is a pass over its whole text (`uncached`).

    Returns:
        the completions of the first prompt, of the second, ...

    Raises:
        DataError: no prompts, an empty one, or limits with which nothing could be generated.
        NonFiniteError: the model's logits are no numbers.
    """
    budgets = budgets_of(prompts, options, rows)
    if grammar is not None:
        grammar.check(model.vocab_size, min(map(min, budgets)))
    was_training = model.training
    model.eval()
    try:
        with whole_sequences(model), recording(model, record_routing) as routing:
            made = _Engine(
                model, prompts, budgets, options, rows, grammar, weight_version, watch, stop, routing, cached
            )
            gathered = (exchange or Exchange()).gather(made.run())
    finally:
        model.train(was_training)
    return sorted((one for part in gathered for one in part), key=lambda one: (one.place, one.sample))


@dataclass
class _Row:
    """A completion being made: its last token, where that stands, and the key of its draws."""

    completion: Completion
    token: int
    position: int
    key: int
    budget: int
    state: int = 0


@dataclass
class _Prefill:
    """The tokens of a prompt before its last one, and the rows that begin with them."""

    place: int
    past: Sequence[int]
    rows: list[int]


class _Engine:
    def __init__(
        self,
        model: VPModel,
        prompts: Sequence[Prompt],
        budgets: Sequence[Sequence[int]],
        options: SamplingOptions,
        rows: int,
        grammar: TokenGrammar | None,
        weight_version: int,
        watch: Callable[[Completion], None] | None,
        stop: Callable[[], bool] | None,
        routing: Callable[[], Tensor] | None,
        cached: bool,
    ) -> None:
        from megatron.core import parallel_state

        self._model, self._prompts, self._budgets, self._options = model, prompts, budgets, options
        self._grammar, self._version, self._watch, self._routing = grammar, weight_version, watch, routing
        self._allowed = None if grammar is None else AllowedTokens(grammar, model.vocab_size, model.device)
        self._group = cast(dist.ProcessGroup, parallel_state.get_data_parallel_group())
        self._together, self._stop = model.pg_collection.ep.size() > 1, stop
        self._model_group = cast(dist.ProcessGroup, parallel_state.get_model_parallel_group())
        mine = range(self._group.rank(), len(prompts), self._group.size())
        mine = sorted(mine, key=lambda place: -max(budgets[place]))  # what may take longest begins first
        self._waiting = deque((place, sample) for place in mine for sample in range(len(budgets[place])))
        self._capacity = min(rows, -(-len(prompts) // self._group.size()) * max(map(len, budgets)))
        steps = sum(map(sum, budgets)) / (self._capacity * self._group.size())
        self._decoder: Any = decoder_of(model, packed=steps >= _PACKED_FROM) if cached else WholeTexts(model, routing)
        self._cache = self._decoder.cache(self._capacity)
        self._rows: list[_Row] = []
        self._done: list[Completion] = []
        self._held: tuple[int, Past, list[NDArray[Any]]] | None = None

    def run(self) -> list[Completion]:
        """This rank's share of the completions."""
        while True:
            pack = self._admit()
            width, rows = self._agreed(sum(len(one.past) for one in pack), len(self._rows))
            if self._is_stopped():
                return self._done
            if width:
                self._prefill(pack, width)
            elif rows:
                self._step(rows)
            else:
                return self._done

    def _agreed(self, *sizes: int) -> list[int]:
        """The largest of every rank's; each rank's own where nothing has to be done together."""
        if not self._together:
            return list(sizes)
        largest = torch.tensor(sizes, device=self._model.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return largest.tolist()

    def _is_stopped(self) -> bool:
        """Whether a rank that computes together with this one was asked to stop."""
        if self._stop is None:
            return False
        asking = (self._model_group, self._group) if self._together else (self._model_group,)
        groups = [group for group in asking if group.size() > 1]
        if not groups:
            return self._stop()
        asked = torch.tensor(self._stop(), dtype=torch.int32, device=self._model.device)
        for group in groups:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=group)
        return bool(asked)

    def _admit(self) -> list[_Prefill]:
        """Let those who wait into free rows, and say which prompts have to be computed for it.

        They wait until a quarter of the rows is free: a pass over several prompts takes little longer than over one.
        """
        pack: list[_Prefill] = []
        if self._rows and len(self._rows) > self._capacity - max(1, self._capacity // 4):
            return pack
        while self._waiting and len(self._rows) < self._capacity:
            place, sample = self._waiting[0]
            prompt, row = self._prompts[place], len(self._rows)
            completion = Completion(place, sample, self._version)
            if self._held is not None and self._held[0] == place:
                self._cache.fill(row, self._held[1])
                completion.routing += self._held[2]
            elif pack and pack[-1].place == place:
                pack[-1].rows.append(row)
            elif len(prompt.ids) > 1:
                if pack and sum(len(one.past) for one in pack) + len(prompt.ids) > _PACKED:
                    break
                pack.append(_Prefill(place, prompt.ids[:-1], [row]))
            self._waiting.popleft()
            key, budget = draw_key(self._options.seed, prompt.identity_or_hash(), sample), self._budgets[place][sample]
            self._rows.append(_Row(completion, prompt.ids[-1], len(prompt.ids) - 1, key, budget))
        return pack

    def _prefill(self, pack: list[_Prefill], width: int) -> None:
        """Run the prompts as the documents of one packed row, and give their keys and values to their rows."""
        device = self._model.device
        ids, document, position = [0] * width, [-1] * width, [0] * width
        spans, end = [], 0
        for number, one in enumerate(pack):
            span = slice(end, end := end + len(one.past))
            ids[span], document[span], position[span] = one.past, [number] * len(one.past), range(len(one.past))
            spans.append(span)
        layout = SequenceLayout(
            torch.tensor([document], dtype=torch.int32, device=device), torch.tensor([position], device=device)
        )
        pasts = self._decoder.pasts(torch.tensor([ids], device=device), layout, spans)
        self._cache.reserve(max((len(one.past) for one in pack), default=0))
        self._held = None
        chosen = None if self._routing is None else self._routing().cpu().numpy()
        for one, span, past in zip(pack, spans, pasts, strict=True):
            routing = [] if chosen is None else [chosen[span]]
            for row in one.rows:
                self._cache.fill(row, past)
                self._rows[row].completion.routing += routing
            if self._waiting and self._waiting[0][0] == one.place:
                self._held = one.place, past, routing

    def _step(self, size: int) -> None:
        """A token for each row; rows that fill up to ``size`` are computed and thrown away."""
        filler = [0] * (size - len(self._rows))
        table = [
            (r.token, r.position, r.key, len(r.completion.ids), r.state, r.budget, self._given(r)) for r in self._rows
        ]
        columns = [[*column, *filler] for column in zip(*table, strict=True)] or [filler] * 7
        token, position, key, count, state, budget, given = torch.tensor(columns, device=self._model.device)
        longest = 1 + max((row.position for row in self._rows), default=0)
        self._cache.reserve(longest)
        logits = self._decoder.step(token, position, self._cache, longest)
        result = torch.empty(3, size, dtype=torch.float64, device=self._model.device)
        if logits is not None:
            allowed = None if self._allowed is None else self._allowed(state, budget - count)
            drawn = uniform(key, count) if self._options.temperature else count
            tokens_B = given if self._prompts[0].given else None
            torch.stack([x.double() for x in choose(logits, self._options, drawn, allowed, tokens_B)], out=result)
        stages.tell_stages(result)
        told = result[:, : len(self._rows)].tolist()
        if self._routing is not None:
            for row, chosen in zip(self._rows, self._routing().cpu().numpy(), strict=False):  # what follows fills up
                row.completion.routing.append(chosen[None])
        for row, chosen, as_sampled, untempered in zip(self._rows, *told, strict=True):
            self._append(row, int(chosen), as_sampled, untempered)
        self._leave()

    def _given(self, row: _Row) -> int:
        """The row's next token, where it is given."""
        completion = row.completion
        given = self._prompts[completion.place].given
        return given[completion.sample][len(completion.ids)] if given else 0

    def _append(self, row: _Row, token: int, as_sampled: float, untempered: float) -> None:
        completion = row.completion
        completion.add(token, as_sampled, untempered)
        row.token, row.position = token, row.position + 1
        if self._grammar is None:
            ends = token in self._options.stop_ids
        else:
            row.state = int(self._grammar.following_SV[row.state, token])
            ends = row.state in self._grammar.accepting
        if ends or len(completion.ids) == row.budget:
            completion.finish = "stop" if ends else "length"
        if self._watch is not None:
            self._watch(completion)

    def _leave(self) -> None:
        """Take finished rows out; the last rows take their places, so that the rows in use are always the first."""
        for number in reversed(range(len(self._rows))):
            if self._rows[number].completion.finish is None:
                continue
            self._done.append(self._rows[number].completion)
            last = self._rows.pop()
            if number < len(self._rows):
                self._rows[number] = last
                self._cache.move(len(self._rows), number)
