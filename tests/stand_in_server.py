"""A server of log-probabilities of prompts on loopback, in vLLM's form or SGLang's, that fails as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import torch

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.gpt import VPModel
from tests.loopback import served_at
from vpmoe.tokenizer import CompactVocabulary

FAULTS = ("drop", "500", "slow", "half", "short", "nan", "busy")
STATUS = {"500": 500, "busy": 429, "refused": 404}


class StandIn:
    """What is served: of each prefix a distribution over some ids that follows from its last three tokens.

    Attributes:
        ids: those that have a probability.
        texts: of every id of the vocabulary.
        faults: number of a request for log-probabilities -> what goes wrong with it; "refused" is final.
        asked_to: number of a request -> what is done before it is answered.
        dead_from: the request from which on every one fails; None: none.
        longest: prompts are cut to so many tokens.
        asked: requests so far.
    """

    def __init__(self, ids: np.ndarray, texts: list[str], form: str = "vllm") -> None:
        self.ids, self.texts, self.form = ids, texts, form
        self.faults: dict[int, str] = {}
        self.asked_to: dict[int, Callable[[], object]] = {}
        self.dead_from: int | None = None
        self.longest, self.most, self.asked, self.address = 10**9, 10**9, 0, ""

    def log_p(self, prefix: list[int]) -> np.ndarray:
        """fp64 [len(ids)], after ``prefix``."""
        logits = 3 * np.random.default_rng(prefix[-3:]).standard_normal(len(self.ids))
        return logits - np.log(np.exp(logits).sum())

    def after_each(self, prompt: list[int]) -> Sequence[np.ndarray]:
        """``log_p`` after the first token of a prompt, the first two, ..., all but the last."""
        return [self.log_p(prompt[:position]) for position in range(1, len(prompt))]

    def place(self, prompt: list[int], position: int, count: int) -> list[tuple[int, float]]:
        """The likeliest at a position of the prompt, and its own token."""
        return self.told(self.log_p(prompt[:position]), prompt[position], count)

    def told(self, log_p: np.ndarray, token: int, count: int) -> list[tuple[int, float]]:
        """The likeliest of a distribution, and a token."""
        top = np.argsort(-log_p)[: min(count, self.most)].tolist()
        own = int(np.flatnonzero(self.ids == token)[0])
        return [(int(self.ids[row]), float(log_p[row])) for row in dict.fromkeys([*top, own])]

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """To a request, whole."""
        prompt = asked["prompt" if self.form == "vllm" else "input_ids"][: self.longest]
        count = asked["prompt_logprobs" if self.form == "vllm" else "top_logprobs_num"]
        rows = zip(self.after_each(prompt), prompt[1:], strict=True)
        places = [self.told(log_p, token, count) for log_p, token in rows]
        if self.form == "vllm":
            told = [
                {str(row): {"logprob": p, "rank": 1, "decoded_token": self.texts[row]} for row, p in place}
                for place in places
            ]
            return {"choices": [{"text": "", "prompt_logprobs": [None, *told]}]}
        own = [[dict(place)[token], token, self.texts[token]] for token, place in zip(prompt[1:], places, strict=True)]
        top = [[[p, row, self.texts[row]] for row, p in place[:count]] for place in places]
        meta = {"input_token_logprobs": [[None, prompt[0], None], *own], "input_top_logprobs": [None, *top]}
        return {"text": "", "meta_info": meta}


class ModelStandIn(StandIn):
    """A model of ours behind a server, over the full vocabulary, of which its compact one has a part."""

    def __init__(self, model: VPModel, vocabulary: CompactVocabulary) -> None:
        texts = [piece.decode(errors="replace") for piece in vocabulary.full.pieces()]
        super().__init__(vocabulary.o200k_ids.astype(np.int64), texts)
        self._model = model

    @torch.no_grad()
    def after_each(self, prompt: list[int]) -> Sequence[np.ndarray]:
        tokens = torch.from_numpy(np.searchsorted(self.ids, prompt[:-1]))[None]
        layout = SequenceLayout(torch.zeros_like(tokens), torch.arange(tokens.shape[1])[None])
        log_p = self._model(tokens, layout).logits().log_softmax(-1)
        return log_p[0, :, : len(self.ids)].numpy()


@contextmanager
def serving(stand_in: StandIn) -> Iterator[StandIn]:
    """At ``stand_in.address`` as long as the context lasts."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

        def reply(self, content: bytes, status: int = 200, promised: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(promised or len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.reply(b'{"data": [{"id": "stand-in"}]}')
            elif self.path == "/get_model_info" and stand_in.form == "sglang":
                self.reply(b"{}")
            else:
                self.reply(b"{}", 404)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = stand_in.asked
                stand_in.asked += 1
            dead = stand_in.dead_from is not None and number >= stand_in.dead_from
            fault = "500" if dead else stand_in.faults.get(number)
            stand_in.asked_to.get(number, lambda: None)()
            told = stand_in.answer(asked)
            if fault == "drop":
                self.connection.close()
                return
            if fault == "slow":
                time.sleep(1.0)
            if fault in STATUS:
                self.reply(b"out of order", STATUS[fault])
                return
            if fault == "short" and stand_in.form == "vllm":
                told["choices"][0]["prompt_logprobs"].pop()
            content = json.dumps(told).encode()
            if fault == "nan":
                content = content.replace(b'"logprob": -', b'"logprob": NaN, "x": -', 1)
            if fault == "half":
                self.reply(content[: len(content) // 2], promised=len(content))
                self.connection.close()
                return
            self.reply(content)

    with served_at(Handler) as stand_in.address:
        yield stand_in
