"""A chat model behind an OpenAI-compatible endpoint on loopback: it writes what the request asks for, or as told."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback import served_at

Messages = list[dict[str, str]]
GARBAGE = {
    "garbage": b'{"choices": []}',
    "endless": b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": 1e999}}',
}
"""By the fault's name."""


def right_story(request: str) -> str:
    """A story that keeps to the request; every word of it is at most once one that may be banned."""
    found = re.search(r"hero is (\w+), an? (\w+)\.", request)
    required = re.search(r"in the story as they are: (.*)\.", request)
    assert found and required
    name, kind = found.groups()
    told = " ".join(f"{name} saw the {word}." for word in required[1].split(", "))
    return f"{name} was a {kind}. {told} " + f"Then {name} went on and on along the way. " * 7


class Endpoint:
    """What is served.

    Attributes:
        says: messages -> content; by default a right story, and ``yes`` to a judge's question.
        faults: number of a request -> status, ``drop``, ``slow``, one of ``GARBAGE``, ``null``, ``empty``, or why an
            answer did not end by itself: ``length``, ``content_filter``.
        headers: of answers that are no success.
        key: that a request has to bring; None: none is asked for.
        asked: messages of each request, in the order of their arrival.
        at_once: the most requests that were under way together.
        delay: seconds of an answer.
    """

    def __init__(self, says: Callable[[Messages], str] | None = None) -> None:
        self.says = says or self.by_default
        self.faults: dict[int, int | str] = {}
        self.headers: dict[str, str] = {}
        self.key: str | None = None
        self.asked: list[Messages] = []
        self.paths: set[str] = set()
        self.at_once = self.under_way = 0
        self.delay = 0.0
        self.address = ""

    @staticmethod
    def by_default(messages: Messages) -> str:
        said = messages[-1]["content"]
        return "Yes." if said.startswith("Is this story") else right_story(messages[0]["content"])


@contextmanager
def serving_chat(endpoint: Endpoint) -> Iterator[Endpoint]:
    """At ``endpoint.address`` as long as the context lasts."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

        def reply(self, content: bytes, status: int = 200) -> None:
            self.send_response(status)
            for name, value in endpoint.headers.items() if status != 200 else ():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked.keys() == {"model", "messages"}
            with lock:
                number = len(endpoint.asked)
                endpoint.asked.append(asked["messages"])
                endpoint.paths.add(self.path)
                endpoint.under_way += 1
                endpoint.at_once = max(endpoint.at_once, endpoint.under_way)
            try:
                self.answer(asked, endpoint.faults.get(number))
            finally:
                with lock:
                    endpoint.under_way -= 1

        def answer(self, asked: dict[str, Any], fault: int | str | None) -> None:
            time.sleep(endpoint.delay)
            if endpoint.key is not None and self.headers["Authorization"] != f"Bearer {endpoint.key}":
                self.reply(f"wrong key: {self.headers['Authorization']}".encode(), 401)
            elif isinstance(fault, int):
                self.reply(b"out of order", fault)
            elif fault == "drop":
                self.connection.close()
            elif fault in GARBAGE:
                self.reply(GARBAGE[str(fault)])
            else:
                if fault == "slow":
                    time.sleep(1.6)
                content = None if fault == "null" else "" if fault == "empty" else endpoint.says(asked["messages"])
                ended = fault if fault in ("length", "content_filter") else "stop"
                told = {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": ended}]}
                self.reply(json.dumps({**told, "usage": {"prompt_tokens": 10, "completion_tokens": 3}}).encode())

    with served_at(Handler) as endpoint.address:
        yield endpoint
