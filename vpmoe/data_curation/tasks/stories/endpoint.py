"""A chat model behind an OpenAI-compatible endpoint, and the answers that were got of it: each is paid for once.

``POST BASE/chat/completions`` with ``model`` and ``messages`` alone, which all servers of that form know (OpenAI, vLLM,
SGLang, llama.cpp, Ollama); the answer is ``choices[0].message.content``, unless its ``finish_reason`` says that the
server cut it (``length``) or held a part back (``content_filter``).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from megatron_vpmoe.files import json_line, naming, read_json_lines, sha256_of_json
from vpmoe.errors import DataError, EndpointError

KEY_VARIABLE = "VPMOE_WRITER_KEY"
Messages = Sequence[Mapping[str, str]]
_LONGEST_CONNECT, _LONGEST_WAIT = 10.0, 60.0
_SHOWN_CHARACTERS = 300
_BEGINNING = b'{"request": "'
"""Of every line of the answers."""
_IN_PART = ("length", "content_filter")
_AGAIN = "give the same command again: answers that came are kept"


@dataclass(frozen=True)
class Settings:
    """How an endpoint is spoken to.

    Attributes:
        url: what ``/chat/completions`` stands behind; ``/v1`` is added to an address without a path.
        model: by its name there.
        concurrency: requests under way.
        timeout: seconds for a whole answer.
        attempts: of a request that fails on the way; the wait before the next doubles from ``first_wait`` seconds on,
            or is as long as the endpoint asks for.
    """

    url: str
    model: str
    concurrency: int = 8
    timeout: float = 120.0
    attempts: int = 6
    first_wait: float = 1.0


class _Fault(Exception):
    """What may be otherwise the next time.

    Args:
        reason: as of :class:`EndpointError`.
        wait: seconds that the endpoint asks for.
    """

    def __init__(self, what: str, reason: str, wait: float | None = None) -> None:
        self.reason, self.wait = reason, wait
        super().__init__(what)


class Endpoint:
    """An endpoint that is open; an asynchronous context manager.

    The key is read from the environment variable ``VPMOE_WRITER_KEY``, sent with each request and kept nowhere.

    Args:
        settings: how to speak to it.

    Attributes:
        requests: sent, failed ones too.
        usage: tokens as the endpoint counts them (``prompt_tokens``, ``completion_tokens``), where it does.

    Raises:
        EndpointError: the address or the key is none.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.requests, self.usage = settings, 0, Counter[str]()
        self._url, self._key = _address(settings.url), os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and (self._key.isprintable() or not self._key)):
            raise EndpointError(
                "the key has characters that no header holds",
                source=KEY_VARIABLE,
                remedy="set it to the key alone",
                reason="unauthorized",
            )
        wait = httpx.Timeout(settings.timeout, connect=min(settings.timeout, _LONGEST_CONNECT))
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # Certificates take longer to load than a local model's connection lasts.
        self._client = httpx.AsyncClient(timeout=wait, headers=headers, verify=self._url.startswith("https:"))

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def answer(self, messages: Messages) -> str:
        """What the model says to ``messages``; empty where it says nothing, or not to the end.

        Raises:
            EndpointError: it refuses, or gave no answer in all attempts.
        """
        fault = _Fault("it was not asked", "unreachable")
        for attempt in range(self.settings.attempts):
            if attempt:
                doubled = self.settings.first_wait * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                await asyncio.sleep(min(doubled, _LONGEST_WAIT) if fault.wait is None else fault.wait)
            try:
                async with asyncio.timeout(self.settings.timeout):
                    return await self._asked(messages)
            except _Fault as found:
                fault = found
            except (TimeoutError, httpx.TimeoutException):
                fault = _Fault(f"no answer within {self.settings.timeout:g} s", "timeout")
            except httpx.HTTPError as error:
                fault = _Fault(f"the connection fails: {error or type(error).__name__}", "unreachable")
            if fault.wait is not None and fault.wait > _LONGEST_WAIT:
                break
        later = f" in {fault.wait:.0f} s" if fault.wait else ""
        raise self._error(f"no usable answer in {attempt + 1} attempts: {fault}", f"{_AGAIN}{later}", fault.reason)

    async def _asked(self, messages: Messages) -> str:
        self.requests += 1
        reply = await self._client.post(self._url, json={"model": self.settings.model, "messages": list(messages)})
        status, text = reply.status_code, reply.text[:_SHOWN_CHARACTERS]
        if status in (401, 403):
            what = f"it lets nobody in with {'this' if self._key else 'no'} key ({status}): {text}"
            raise self._error(what, f"set {KEY_VARIABLE} to a key that it takes", "unauthorized")
        if status == 404:
            what = f"there is no such address, or no model {self.settings.model!r} (404): {text}"
            remedy = "name what /chat/completions stands behind (--writer), and a model there (--writer-model)"
            raise self._error(what, remedy, "not_found")
        if status in (408, 425, 429) or status >= 500:
            reason = "rate_limited" if status == 429 else "unreachable"
            raise _Fault(f"it answers {status}: {text}", reason, _wait_asked_for(reply.headers.get("Retry-After")))
        if status != 200:
            raise self._error(f"it refuses ({status}): {text}", "mend what it names", "refused")
        try:
            said = json.loads(reply.content)
            choice = said["choices"][0]
            content = "" if choice.get("finish_reason") in _IN_PART else choice["message"]["content"]
            counted = said.get("usage") or {}
            self.usage.update({name: int(counted.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")})
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise _Fault(f"its answer is no chat completion: {text}", "unusable") from error
        return content if isinstance(content, str) else ""

    def _error(self, what: str, remedy: str, reason: str) -> EndpointError:
        hidden = what.replace(self._key, "***") if self._key else what  # an endpoint may say the key back
        return EndpointError(hidden, source=self._url, remedy=remedy, reason=reason)


class Answers:
    """Answers by what was asked, in a file that only grows; what a kill left of a line goes when it is opened.

    Args:
        path: the file, one JSON object a line; made with the first answer.

    Raises:
        DataError: it is none of ours.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._known = path, dict[str, str]()
        if not path.exists():
            return
        for number, line in read_json_lines(path):
            try:
                key, text = line["request"], line["answer"]
                if not (isinstance(key, str) and isinstance(text, str)):
                    raise TypeError
            except (TypeError, KeyError) as error:
                raise DataError(
                    "this is no answer that was kept", source=f"{path}:{number}", remedy="move the file away"
                ) from error
            self._known[key] = text
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if torn := content[whole:]:
            if torn[: len(_BEGINNING)] != _BEGINNING[: len(torn)]:
                raise DataError(
                    "its last line is none that a kill left of ours", source=str(path), remedy="move the file away"
                )
            os.truncate(path, whole)

    @staticmethod
    def key(model: str, messages: Messages, attempt: int) -> str:
        """Of a request; the address is none of it, since the same model may move."""
        return sha256_of_json({"model": model, "messages": list(messages), "attempt": attempt})

    def get(self, key: str) -> str | None:
        """The answer, if there is one."""
        return self._known.get(key)

    def add(self, key: str, text: str) -> None:
        """Keep an answer, durably."""
        self._known[key] = text
        with naming(self._path), self._path.open("ab") as stream:
            stream.write(json_line({"request": key, "answer": text}).encode())
            stream.flush()
            os.fsync(stream.fileno())


def _address(url: str) -> str:
    """Where completions are asked of; credentials in it would be shown in messages."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise EndpointError(
            f"no address: {error}", source="--writer", remedy="give http://host:port", reason="not_found"
        ) from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query or parsed.fragment:
        raise EndpointError(
            "no address of an endpoint: it takes http or https, a host and a path, and nothing else",
            source="--writer",
            remedy=f"give http://host:port or https://host/v1; a key goes into {KEY_VARIABLE}",
            reason="not_found",
        )
    base = str(parsed).rstrip("/").removesuffix("/chat/completions")
    return f"{base}/v1/chat/completions" if parsed.path in ("", "/") else f"{base}/chat/completions"


def _wait_asked_for(header: str | None) -> float | None:
    """Seconds of a ``Retry-After``: a number of them, or a date (RFC 9110, 10.2.3); None where it is neither."""
    if header is None:
        return None
    with suppress(ValueError):
        seconds = float(header)
        return max(seconds, 0.0) if seconds < float("inf") else None
    with suppress(ValueError, TypeError, OverflowError):
        return max(parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    return None
