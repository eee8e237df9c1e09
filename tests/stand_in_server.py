"""A server of log-probabilities of prompts on loopback, in vLLM's form or SGLang's, that fails as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

FAULTS = ("drop", "500", "slow", "half", "short", "nan", "busy")


class StandIn:
    """What is served: of each prefix a distribution over some ids that follows from its last three tokens.

    Attributes:
        ids: those that have a probability.
        texts: of every id of the vocabulary.
        faults: number of a request for log-probabilities -> what goes wrong with it.
        dead_from: the request from which on every one fails; None: none.
        longest: prompts are cut to so many tokens.
        asked: requests so far.
    """

    def __init__(self, ids: np.ndarray, texts: list[str], form: str = "vllm") -> None:
        self.ids, self.texts, self.form = ids, texts, form
        self.faults: dict[int, str] = {}
        self.dead_from: int | None = None
        self.longest, self.most, self.asked, self.address = 10**9, 10**9, 0, ""

    def log_p(self, prefix: list[int]) -> np.ndarray:
        """fp64 [len(ids)], after ``prefix``."""
        logits = 3 * np.random.default_rng(prefix[-3:]).standard_normal(len(self.ids))
        return logits - np.log(np.exp(logits).sum())

    def place(self, prompt: list[int], position: int, count: int) -> list[tuple[int, float]]:
        """The likeliest at a position of the prompt, and its own token."""
        log_p = self.log_p(prompt[:position])
        top = np.argsort(-log_p)[: min(count, self.most)].tolist()
        own = int(np.flatnonzero(self.ids == prompt[position])[0])
        return [(int(self.ids[row]), float(log_p[row])) for row in dict.fromkeys([*top, own])]

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """To a request, whole."""
        prompt = asked["prompt" if self.form == "vllm" else "input_ids"][: self.longest]
        count = asked["prompt_logprobs" if self.form == "vllm" else "top_logprobs_num"]
        places = [self.place(prompt, position, count) for position in range(1, len(prompt))]
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
            told = stand_in.answer(asked)
            if fault == "drop":
                self.connection.close()
                return
            if fault == "slow":
                time.sleep(1.0)
            if fault in ("500", "busy"):
                self.reply(b"out of order", 500 if fault == "500" else 429)
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    stand_in.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
