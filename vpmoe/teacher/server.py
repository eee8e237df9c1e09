"""A teacher behind a server that returns log-probabilities of a prompt: vLLM's completions, or SGLang's generate.

vLLM (since 0.4.3; 0.6 to 0.20 give the same form): ``/v1/completions`` with ``prompt_logprobs``; started with
``--max-logprobs K``. SGLang (since 0.3): ``/generate`` with ``return_logprob`` and ``top_logprobs_num``. Both take a
prompt as ids and give ids back, so nothing is read out of texts. They say probabilities at temperature 1.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import httpx
import numpy as np

from megatron_vpmoe.teacher_records import FILLING_LOG_P
from vpmoe.errors import DataError, TokenizerError, VpmoeError
from vpmoe.teacher.daemons import Daemons
from vpmoe.teacher.interface import Answer, Conversation, Question
from vpmoe.tokenizer import Tokenizer

_PROBED = 256
_LONGEST_WAIT, _LONGEST_CALL = 30.0, 10.0


class ServerError(VpmoeError):
    """A server that cannot be reached, or whose answer cannot be used."""


class _Fault(Exception):
    """What may be otherwise the next time."""


class _Place(NamedTuple):
    """What is said of one token of the prompt: (id, log p, text) of the likeliest and of the token itself."""

    entries: list[tuple[int, float, str | None]]


@dataclass(frozen=True)
class Settings:
    """How a server is spoken to.

    Attributes:
        address: ``http://host:port``.
        model: by which it serves the teacher; None: the only one.
        concurrency: requests under way.
        attempts: of each request; the wait before the next doubles from ``first_wait`` seconds on.
        timeout: seconds for an answer.
    """

    address: str
    model: str | None = None
    concurrency: int = 16
    attempts: int = 6
    first_wait: float = 0.5
    timeout: float = 600.0


class ServerTeacher:
    """See ``Teacher``.

    Args:
        settings: how to speak to it.
        tokenizer: its vocabulary, to be held id by id; None: probes alone tell.

    Attributes:
        threads: while it is open, ``settings.concurrency`` that ask.

    Raises:
        ServerError: it is not there, or serves another model.
    """

    def __init__(self, settings: Settings, tokenizer: Tokenizer | None = None) -> None:
        self._address = address = settings.address.rstrip("/").removesuffix("/v1")
        self._settings, self.tokenizer = settings, tokenizer
        self.threads = Daemons(0)
        wait = httpx.Timeout(settings.timeout, connect=min(settings.timeout, _LONGEST_CALL))
        many = httpx.Limits(max_connections=settings.concurrency)
        try:
            self._client = httpx.Client(base_url=address, timeout=wait, limits=many)
        except (httpx.InvalidURL, ValueError) as error:
            raise ServerError(f"no address: {error}", source=address, remedy="give http://host:port") from error
        served = self._asked("GET", "/v1/models", read=lambda said: [str(entry["id"]) for entry in said["data"]])
        wanted = settings.model or (served[0] if len(served) == 1 else None)
        if wanted not in served:
            raise ServerError(
                f"it serves {', '.join(served) or 'nothing'}" + (f", not {wanted}" if wanted else ""),
                source=address,
                remedy="name one with --served-model",
            )
        try:
            self._client.get("/get_model_info").raise_for_status()
            self._form = "sglang"
        except httpx.HTTPError:
            self._form = "vllm"
        self._model = str(wanted)
        self.identity: dict[str, Any] = {"by": "server", "form": self._form, "model": self._model}
        self.told: dict[str, Any] = {"name": f"{self._model} at {address}"}

    @contextmanager
    def open(self, question: Question, student: Tokenizer | None) -> Iterator[ServerTeacher]:
        """See ``Teacher``; asks for a few hundred ids and refuses a server that means others by them.

        Raises:
            DataError: the temperature is not 1.
            ServerError: it truncates, or gives fewer than K.
            TokenizerError: an id means something else to it.
        """
        if question.temperature != 1:
            raise DataError(
                f"a server says probabilities at temperature 1, not {question.temperature}",
                source="--temperature",
                remedy="store them at 1, or score with --by hf",
            )
        self._question = question
        assert student is not None
        self._probe(question, student)
        self.threads = Daemons(self._settings.concurrency)
        try:
            yield self
        finally:
            self.threads.close()

    def score(self, conversations: Iterable[Conversation]) -> Iterator[list[Answer]]:
        """See ``Scorer``; a list for each conversation, so that all that was said is kept."""
        running: deque[Future[Answer]] = deque()
        for conversation in conversations:
            running.append(self.threads.submit(partial(self.answer, conversation)))
            if len(running) >= 2 * self._settings.concurrency:
                yield [running.popleft().result()]
        while running:
            yield [running.popleft().result()]

    def answer(self, conversation: Conversation) -> Answer:
        """What it says of a conversation, tried again where that may help; of any thread.

        Raises:
            ServerError: there is no usable answer.
            DataError: a label is not the token that follows.
        """
        tokens, positions, labels = conversation
        places = self._places(tokens.tolist())
        count = self._question.count
        ids = np.empty((len(positions), count), np.int32)
        log_p, of_label = np.empty(ids.shape, np.float32), np.empty(len(positions), np.float32)
        for row, (position, label) in enumerate(zip(positions.tolist(), labels.tolist(), strict=True)):
            entries = sorted(places[position + 1].entries, key=lambda entry: (-entry[1], entry[0]))
            likeliest = entries[:count]
            ids[row] = [entry[0] for entry in likeliest]
            log_p[row] = [max(entry[1], FILLING_LOG_P) for entry in likeliest]
            said = next((entry[1] for entry in entries if entry[0] == label), None)
            if said is None:
                raise DataError(
                    f"the label {label} is not the token that follows, and a server says nothing of it",
                    source=self.told["name"],
                    remedy="have a model score the dataset (vpmoe data score --by hf or --by megatron)",
                )
            of_label[row] = max(said, FILLING_LOG_P)
        return Answer((ids, log_p, of_label), np.zeros(len(positions), np.float32))

    def _places(self, tokens: list[int], attempts: int | None = None) -> list[_Place]:
        """What the server says of each token of a prompt, the first left empty."""
        count = max(self._question.count, 1)

        def read(said: dict[str, Any]) -> list[_Place]:
            places = _of_vllm(said) if self._form == "vllm" else _of_sglang(said)
            if len(places) != len(tokens):
                raise _Fault(f"it tells of {len(places)} tokens, the prompt has {len(tokens)}: it truncates prompts")
            for token, (entries,) in zip(tokens[1:], places[1:], strict=True):
                if not all(math.isfinite(entry[1]) and entry[1] < 1e-3 for entry in entries):
                    raise _Fault("it gives a log-probability that is none")
                if token not in {entry[0] for entry in entries}:
                    raise _Fault(f"it says nothing of the token {token} of the prompt")
                if len(entries) < count:
                    raise _Fault(
                        f"it gives {len(entries)} of the {count} likeliest: start vLLM with --max-logprobs {count}"
                    )
            return places

        if self._form == "vllm":
            asked = {
                "model": self._model,
                "prompt": tokens,
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": count,
            }
            return self._asked("POST", "/v1/completions", asked, read, attempts)
        asked = {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
        }
        asked |= {"logprob_start_len": 0, "top_logprobs_num": count, "return_text_in_logprobs": True}
        return self._asked("POST", "/generate", asked, read, attempts)

    def _asked(
        self, method: str, path: str, content: Any = None, read: Any = lambda said: said, attempts: int | None = None
    ) -> Any:
        """The answer to a request as ``read`` takes it; what may pass is tried again, after longer and longer waits."""
        attempts = attempts or self._settings.attempts
        fault: Exception = _Fault("it was not asked")
        for attempt in range(attempts):
            if attempt:
                wait = min(self._settings.first_wait * 2 ** (attempt - 1), _LONGEST_WAIT)
                if self.threads.closed.wait(wait * random.uniform(0.5, 1.0)):
                    break
            try:
                reply = self._client.request(method, path, json=content)
                if 400 <= reply.status_code < 500 and reply.status_code not in (408, 425, 429):
                    raise ServerError(
                        f"it refuses ({reply.status_code}): {reply.text[:300]}",
                        source=self._address + path,
                        remedy="start it for this (vLLM: --max-logprobs K, --max-model-len of the longest document)",
                    )
                reply.raise_for_status()
                return read(reply.json())
            except (httpx.HTTPError, ValueError, _Fault, KeyError, TypeError, IndexError, AttributeError) as error:
                fault = error
        raise ServerError(
            f"no usable answer in {attempts} attempts: {str(fault) or type(fault).__name__}",
            source=self._address + path,
            remedy="start or mend it, then give the command again (a training with --resume): it goes on where it was",
        ) from fault

    def _probe(self, question: Question, student: Tokenizer) -> None:
        """Ids of all parts of the vocabulary, in one prompt; the texts of those that are whole characters."""
        pieces = student.pieces()
        ordinary = np.linspace(0, student.first_special_id - 1, _PROBED).astype(int).tolist()
        named = list(student.special_tokens.values())
        probed = [*dict.fromkeys([*ordinary, *named])]
        asked = question.among[probed].tolist()
        places, compared = self._places(asked, attempts=2), 0
        for place, row, (entries,) in list(zip(probed, asked, places, strict=True))[1:]:
            text = next(entry[2] for entry in entries if entry[0] == row)
            if text is None or student.is_special(place) or "\ufffd" in pieces[place].decode(errors="replace"):
                continue
            compared += 1
            if text != pieces[place].decode():
                raise TokenizerError(
                    f"id {row} is {text!r} to the server, the dataset means {pieces[place].decode()!r} by it",
                    source=self.told["name"],
                    remedy="serve a model of the dataset's vocabulary",
                )
        if not compared and self.tokenizer is None:
            raise TokenizerError(
                "it tells no texts of ids, so its vocabulary cannot be held against the dataset's",
                source=self.told["name"],
                remedy="name the folder of its tokenizer.json with --teacher-tokenizer",
            )


def _of_vllm(said: dict[str, Any]) -> list[_Place]:
    told = said["choices"][0]["prompt_logprobs"]
    return [
        _Place(
            [(int(row), float(entry["logprob"]), entry.get("decoded_token")) for row, entry in (place or {}).items()]
        )
        for place in told
    ]


def _of_sglang(said: dict[str, Any]) -> list[_Place]:
    meta, places = said["meta_info"], []
    for own, top in zip(meta["input_token_logprobs"], meta["input_top_logprobs"], strict=True):
        entries = {int(row): (int(row), float(log_p), text) for log_p, row, text in top or () if log_p is not None}
        if own[0] is not None:
            entries.setdefault(int(own[1]), (int(own[1]), float(own[0]), own[2]))
        places.append(_Place(list(entries.values())))
    return places
