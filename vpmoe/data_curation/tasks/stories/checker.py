"""Whether a text keeps to what was asked of a story: who leads it, words that must be in it, words that must not.

The one rule for everybody: what the templates write, what a served model writes, and what a trained model generates.

**Words** are compared whole and whatever their case. A word is there as itself, with ``'s``, and with the regular
endings of English spelling: ``s`` (``es`` behind s, x, z, ch, sh, o), ``ed`` and ``ing``. A final ``e`` behind a
consonant goes before ``ing``, and only ``d`` comes behind an ``e``; a final ``y`` behind a consonant becomes ``ies``
and ``ied``; a final consonant behind a single vowel (``qu`` is none) is doubled before ``ed`` and ``ing``, in words of
several syllables it may be. So ``hop`` is there in ``hopped`` and not in ``hoped``; other forms (``mice``, ``ran``) are
other words.

**The protagonist** is right if the name is in the text; no other name comes before it or more often; the kind is in
the text; and nothing introduces the name as another kind, in one of the forms that the stories have (where Pip is a
fox: ``a bear named Pip``, ``a bear whose name was Pip``, ``a bear. His name was Pip``, ``Pip was a small bear``,
``Pip, a small bear,``). Names are those that the stories have, and any word with a capital behind ``named`` or
``called``; they are compared with their case.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vpmoe.data_curation.tasks.stories.content import kinds, names
from vpmoe.errors import DataError

_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
_NAMED = re.compile(r"\b(?:named|called)\s+([^\W\d_]\w*)")
# What a name is said to be, before it and behind it. Of "the bear called Pip" the verb may be to call out; of "Pip, a
# bear" without a second comma the bear may be another.
_BEFORE = re.compile(
    r"(?<![\w'’-])(?:([\w'’-]+)(?:,?\s+named|[.,;!]?\s+(?i:his|her|its|whose)\s+name\s+(?:is|was))"
    r"|(?i:an?)\s+(?:[\w-]+\s+){0,3}([\w-]+),?\s+called)\s+\Z"
)
_UP_TO_TWO = r"(?:[\w'’-]+\s+){0,2}"
_BEHIND = re.compile(rf"\s+(?:is|was)\s+an?\s+({_UP_TO_TWO}[\w'’-]+)|,\s+an?\s+{_UP_TO_TWO}([\w'’-]+)\s*[,;.!?]")
_LONGEST = 80
"""Characters of such a phrase."""
_VOWELS = frozenset("aeiou")
_VOWEL_GROUP = re.compile("[aeiouy]+")


@dataclass(frozen=True, slots=True)
class StoryCheck:
    """How a text stands to its constraints.

    Attributes:
        required_present: all required words are there.
        missing: required words that are not.
        protagonist_right: see the module.
        banned_present: banned words that are there.
    """

    required_present: bool
    missing: tuple[str, ...]
    protagonist_right: bool
    banned_present: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """All that was asked is kept."""
        return self.required_present and self.protagonist_right and not self.banned_present


@dataclass(frozen=True, slots=True)
class Constraints:
    """What is asked of a story.

    Attributes:
        name, kind: of the protagonist.
        theme: what it is about; no rule can check it.
        required, banned: words.
    """

    name: str
    kind: str
    theme: str
    required: tuple[str, ...]
    banned: tuple[str, ...]

    @classmethod
    def of_row(cls, constraints: Mapping[str, Any], source: str | None = None) -> Constraints:
        """Those of a row (``protagonist`` with ``name`` and ``kind``, ``theme``, ``required_words``, ``banned_words``).

        Raises:
            DataError: one is missing or of another type.
        """
        try:
            hero = constraints["protagonist"]
            if strange := [name for name in ("required_words", "banned_words") if isinstance(constraints[name], str)]:
                raise TypeError(f"{strange[0]} is a text and no list")
            read = cls(
                hero["name"],
                hero["kind"],
                constraints["theme"],
                tuple(constraints["required_words"]),
                tuple(constraints["banned_words"]),
            )
            if not isinstance(read.theme, str):
                raise TypeError("the theme is no text")
            for word in (read.name, read.kind, *read.required, *read.banned):
                if not _WORD.fullmatch(word) or _plain(word) != word:
                    raise TypeError(f"{word!r} is not one word")
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"these are no constraints of a story: {error}",
                source=source,
                remedy="give protagonist {name, kind}, theme, required_words and banned_words, as story-prompts writes",
            ) from error
        return read

    def as_row(self) -> dict[str, Any]:
        """As :meth:`of_row` reads them."""
        return {
            "protagonist": {"name": self.name, "kind": self.kind},
            "theme": self.theme,
            "required_words": list(self.required),
            "banned_words": list(self.banned),
        }


def check_story(text: str, constraints: Constraints | Mapping[str, Any]) -> StoryCheck:
    """Hold a text to its constraints.

    Args:
        text: any text.
        constraints: what was asked, or the ``constraints`` of a row.

    Raises:
        DataError: the constraints are none.
    """
    asked = constraints if isinstance(constraints, Constraints) else Constraints.of_row(constraints)
    words = words_of(text)
    missing = tuple(word for word in asked.required if not is_in(word, words))
    banned = tuple(word for word in asked.banned if is_in(word, words))
    return StoryCheck(not missing, missing, _leads(text, words, asked), banned)


def words_of(text: str) -> frozenset[str]:
    """The words of a text in lower case, straight apostrophes in them."""
    return frozenset(word.replace("’", "'") for word in _WORD.findall(text.lower()))


def is_in(word: str, words: frozenset[str]) -> bool:
    """Whether a word is among those of :func:`words_of`, in one of its forms."""
    return not words.isdisjoint(_forms(word.lower().replace("’", "'").strip()))


@lru_cache(4096)
def _forms(word: str) -> frozenset[str]:
    behind_consonant = len(word) > 2 and word[-2] not in _VOWELS
    stems = {word}
    if word.endswith("e"):
        past, present = {word + "d"}, {word[:-1] + "ing" if behind_consonant else word + "ing"}
    elif word.endswith("y") and behind_consonant:
        past, present = {word[:-1] + "ied"}, {word + "ing"}
    else:
        alone = len(word) > 2 and (word[-3] not in _VOWELS or word[-4:-2] == "qu")
        if alone and word[-1] not in "aeiouwxy" and word[-2] in _VOWELS:
            stems = {word + word[-1]} if len(_VOWEL_GROUP.findall(word)) == 1 else {word, word + word[-1]}
        past, present = {stem + "ed" for stem in stems}, {stem + "ing" for stem in stems}
    if word.endswith("y") and behind_consonant:
        plural = word[:-1] + "ies"
    else:
        plural = word + ("es" if word.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")
    return frozenset({word, word + "'s", plural, *past, *present})


def _leads(text: str, words: frozenset[str], asked: Constraints) -> bool:
    known = names() | {asked.name} | {name for name in _NAMED.findall(text) if name[0].isupper()}
    named = [name for name in _WORD.findall(text) for name in [_plain(name)] if name in known]
    if not named or named[0] != asked.name or not is_in(asked.kind, words):
        return False
    counts = Counter(named)
    if counts[asked.name] < max(counts.values()):
        return False
    return _kinds_said(asked.name, text) <= {asked.kind.lower()}


def _kinds_said(name: str, text: str) -> set[str]:
    """As what a name is introduced: of each phrase the first word that is a kind."""
    said = set[str]()
    for found in re.finditer(rf"\b{re.escape(name)}\b", text):
        begin, end = found.span()
        before = _BEFORE.search(text[max(0, begin - _LONGEST) : begin])
        for phrase in (before, _BEHIND.match(text[end : end + _LONGEST])):
            if phrase is not None:
                words = phrase[phrase.lastindex or 0].lower().split()
                said.update([word for word in words if word in kinds()][:1])
    return said


def _plain(name: str) -> str:
    """A name without its ``'s``."""
    return re.sub(r"['’]s?$", "", name)
