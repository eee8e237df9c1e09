"""Stories of prompts by a served model instead of the templates, held to the same checker.

A story that fails is asked for again, with what is wrong with it; after so many times the row is dropped and counted.
Nothing takes its place. What was answered is kept beside the output, so that the same command, after whatever ended it,
asks for the rest alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vpmoe.data_curation.tasks.stories.checker import Constraints, check_story
from vpmoe.data_curation.tasks.stories.content import with_article
from vpmoe.data_curation.tasks.stories.endpoint import Answers, Endpoint, Messages, Settings
from vpmoe.data_curation.tasks.stories.prompts import LONGEST, SHORTEST, Asked
from vpmoe.errors import RowError
from vpmoe.harmony.conversation import check_text
from vpmoe.progress import Progress

VERSION = 2
"""Of what a model is told, and its stories are held to."""


@dataclass(frozen=True)
class Writing:
    """What decides what a model writes.

    Attributes:
        endpoint: who writes.
        tries: times that a story is asked for.
        judge: the model says of each story whether it is about its theme; one that is not has failed.
    """

    endpoint: Settings
    tries: int = 3
    judge: bool = False

    def as_key(self) -> dict[str, Any]:
        """What of it a step's key holds; how it is spoken to decides nothing."""
        return {"model": self.endpoint.model, "tries": self.tries, "judge": self.judge, "version": VERSION}


@dataclass
class Told:
    """What came of it.

    Attributes:
        stories: of each row, in order: one, or with a rejected one two; None: it was dropped.
        dropped: of each dropped row its number, why its last story failed, and that story.
        judged: answers of the judge: ``yes``, ``no``, ``unclear``.
        kept_before: answers that had been got before.
    """

    stories: list[tuple[str, ...] | None]
    dropped: list[dict[str, Any]] = field(default_factory=list)
    judged: Counter[str] = field(default_factory=Counter)
    kept_before: int = 0
    requests: int = 0
    usage: Counter[str] = field(default_factory=Counter)

    def report(self) -> dict[str, Any]:
        """For the receipt."""
        return {
            "dropped": dict(Counter(entry["reason"] for entry in self.dropped)),
            "judged": dict(self.judged),
            "requests": self.requests,
            "answers_kept_before": self.kept_before,
            **self.usage,
        }


class _Failed(Exception):
    """A story that does not keep to what was asked.

    Args:
        reason: a short name, by which dropped rows are counted.
        told: what is wrong, to the model.
    """

    def __init__(self, reason: str, told: str) -> None:
        self.reason, self.told = reason, told
        super().__init__(told)


def write_stories(
    rows: int,
    asked_of: Callable[[int], Asked],
    writing: Writing,
    answers: Answers,
    *,
    wrong_of: Callable[[Asked], Constraints] | None = None,
    quiet: bool = False,
) -> Told:
    """A model's stories of all rows.

    Args:
        rows: how many.
        asked_of: what each asks for.
        writing: who writes, and how often.
        answers: what is known already; what comes is added.
        wrong_of: what a rejected story keeps to; None: there is none.
        quiet: no progress.

    Raises:
        EndpointError: the endpoint cannot be asked any longer; what came is kept.
        OSError: the disk does not take an answer.
    """
    try:
        return asyncio.run(_write(rows, asked_of, writing, answers, wrong_of, quiet))
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def _write(
    rows: int,
    asked_of: Callable[[int], Asked],
    writing: Writing,
    answers: Answers,
    wrong_of: Callable[[Asked], Constraints] | None,
    quiet: bool,
) -> Told:
    told, numbers = Told([None] * rows), iter(range(rows))
    with Progress("stories written", rows, quiet=quiet) as progress:
        async with Endpoint(writing.endpoint) as endpoint:
            desk = _Desk(endpoint, writing, answers, told)

            async def work(numbers: Iterator[int]) -> None:
                for number in numbers:
                    asked = asked_of(number)
                    try:
                        stories = [await desk.story(asked.constraints)]
                        if wrong_of is not None:
                            stories.append(await desk.story(wrong_of(asked), not_of=asked.constraints))
                        told.stories[number] = tuple(stories)
                    except _Dropped as dropped:
                        told.dropped.append({"row": number, "reason": dropped.reason, "story": dropped.story})
                    progress.add(1, doing=f"{len(told.dropped)} dropped")

            async with asyncio.TaskGroup() as group:
                for _ in range(writing.endpoint.concurrency):
                    group.create_task(work(numbers))
            told.requests, told.usage = endpoint.requests, endpoint.usage
    told.dropped.sort(key=lambda entry: entry["row"])
    return told


class _Dropped(Exception):
    """No story came that keeps to what was asked."""

    def __init__(self, reason: str, story: str) -> None:
        self.reason, self.story = reason, story
        super().__init__(reason)


@dataclass
class _Desk:
    """Asks for one story at a time, until it is right."""

    endpoint: Endpoint
    writing: Writing
    answers: Answers
    told: Told

    async def story(self, asked: Constraints, *, not_of: Constraints | None = None) -> str:
        """A story that keeps to ``asked``; raises :class:`_Dropped` where none came.

        Args:
            asked: what it keeps to.
            not_of: a rejected story: what it keeps to but for the protagonist.
        """
        messages: list[dict[str, str]] = [{"role": "user", "content": _request(asked)}]
        reason, text = "", ""
        for attempt in range(self.writing.tries):
            text = (await self._said(messages, attempt)).strip()
            try:
                _check(text, asked, not_of)
                if self.writing.judge:
                    await self._judge(text, asked.theme)
            except _Failed as failed:
                reason = failed.reason
                if reason != "no_text":  # some endpoints refuse a message that is empty
                    again = f"This story cannot be used: {failed.told}. Write it again, all of it, and mend that."
                    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": again}]
            else:
                return text
        raise _Dropped(reason, text)

    async def _judge(self, text: str, theme: str) -> None:
        question = f"Is this story about {theme}? Answer with one word, yes or no.\n\n{text}"
        said = (await self._said([{"role": "user", "content": question}], 0)).strip().lower()
        answer = next((word for word in ("yes", "no") if said.startswith(word)), "unclear")
        self.told.judged[answer] += 1
        if answer != "yes":
            raise _Failed("theme", f"it is not about {theme}")

    async def _said(self, messages: Messages, attempt: int) -> str:
        key = self.answers.key(self.writing.endpoint.model, messages, attempt)
        known = self.answers.get(key)
        if known is not None:
            self.told.kept_before += 1
            return known
        text = await self.endpoint.answer(messages)
        self.answers.add(key, text)
        return text


def _request(asked: Constraints) -> str:
    """What the model is asked."""
    return "\n".join(
        (
            f"Write a story for a small child in simple English, {SHORTEST} to {LONGEST} words long.",
            f"The hero is {asked.name}, {with_article(asked.kind)}. Say so at the beginning, by this name and this "
            "word, and call nobody else by name earlier or more often.",
            f"The theme is {asked.theme}.",
            f"These words must be in the story as they are: {', '.join(asked.required)}.",
            f"These words must not be in it in any form: {', '.join(asked.banned)}.",
            "Answer with the story alone, without a title.",
        )
    )


def _check(text: str, asked: Constraints, not_of: Constraints | None) -> None:
    try:
        check_text(text, "the story")
    except RowError as error:
        raise _Failed("no_text", error.what) from error
    if not SHORTEST <= (words := len(text.split())) <= LONGEST:
        raise _Failed("length", f"it has {words} words and not {SHORTEST} to {LONGEST}")
    check = check_story(text, asked)
    if check.missing:
        raise _Failed("required", f"it lacks {', '.join(check.missing)}")
    if check.banned_present:
        raise _Failed("banned", f"it has {', '.join(check.banned_present)}")
    if not check.protagonist_right:
        raise _Failed("protagonist", f"its hero is not {asked.name}, {with_article(asked.kind)}, from the beginning on")
    if not_of is not None and check_story(text, not_of).protagonist_right:
        raise _Failed("protagonist", f"its hero must not be {not_of.name}, {with_article(not_of.kind)}")
