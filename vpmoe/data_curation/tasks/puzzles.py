"""Small logic puzzles: an order put together from comparisons, and who tells the truth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from vpmoe.data_curation.tasks.family import DrawnFamily, Instance, Worked
from vpmoe.data_curation.tasks.lookup import NAMES

_PEOPLE = {"order of 3": 3, "order of 4": 4, "order of 5": 5, "liars": 4}
_FASTER = {"en": "{} runs faster than {}.", "de": "{} läuft schneller als {}.", "fr": "{} arrive avant {}."}
_SLOWER = {"en": "{} runs slower than {}.", "de": "{} läuft langsamer als {}.", "fr": "{} arrive après {}."}
# By place in the order: first, second, last.
_ASKED = {
    "en": {0: "Who is the fastest?", 1: "Who is the second fastest?", -1: "Who is the slowest?"},
    "de": {0: "Wer ist am schnellsten?", 1: "Wer ist am zweitschnellsten?", -1: "Wer ist am langsamsten?"},
    "fr": {0: "Qui arrive en premier ?", 1: "Qui arrive en deuxième ?", -1: "Qui arrive en dernier ?"},
}
_LIARS = {
    "en": ("Everyone here always lies or always tells the truth.", "{} tells the truth.", "{} lies."),
    "de": ("Jeder hier lügt immer oder sagt immer die Wahrheit.", "{} sagt die Wahrheit.", "{} lügt."),
    "fr": ("Ici, chacun ment toujours ou dit toujours la vérité.", "{} dit la vérité.", "{} ment."),
}
_SAYS = {"en": "{} says: {}", "de": "{} sagt: {}", "fr": "{} dit : {}"}
_DOES = {
    "en": ("Does {} tell the truth?", "yes", "no"),
    "de": ("Sagt {} die Wahrheit?", "ja", "nein"),
    "fr": ("Est-ce que {} dit la vérité ?", "oui", "non"),
}
_TRUE_FALSE = {"en": ("true", "false"), "de": ("wahr", "falsch"), "fr": ("vrai", "faux")}


def _draw(level: str, rng: random.Random) -> Instance:
    """``(names, asked)``: fastest first and a place; or each who speaks of the next, and what they are."""
    names = tuple(rng.sample(NAMES, _PEOPLE[level]))
    if level == "liars":
        return names, tuple(rng.randrange(2) for _ in names)
    return names, rng.choice((0, 1, -1))


def _work(instance: Instance, rng: random.Random, language: str) -> Worked:
    level, names, asked = instance
    return (_liars if level == "liars" else _order)(names, asked, rng, language)


def _order(names: Sequence[str], place: int, rng: random.Random, language: str) -> Worked:
    pairs = list(pairwise(names))
    shuffled = rng.sample(pairs, len(pairs))
    clues = [
        _FASTER[language].format(fast, slow) if rng.random() < 0.5 else _SLOWER[language].format(slow, fast)
        for fast, slow in shuffled
    ]
    # Every clue as a comparison, then the chain grows from its fastest by the clue that fits.
    lines = [f"{fast} > {slow}" for fast, slow in shuffled]
    lines += [" > ".join(names[:count]) for count in range(3, len(names) + 1)]
    return Worked(" ".join([*clues, _ASKED[language][place]]), "\n".join(lines), names[place])


def _liars(names: Sequence[str], truthful: Sequence[int], rng: random.Random, language: str) -> Worked:
    rule, honest, liar = _LIARS[language]
    question, yes, no = _DOES[language]
    claims = [
        (who, whom, own == other) for (who, whom), (own, other) in zip(pairwise(names), pairwise(truthful), strict=True)
    ]
    said = [_SAYS[language].format(who, (honest if good else liar).format(whom)) for who, whom, good in claims]
    known = (honest if truthful[0] else liar).format(names[0])
    facts = [known, *rng.sample(said, len(said))]
    true_word, false_word = _TRUE_FALSE[language]
    lines = [known]
    for (who, whom, good), (own, other) in zip(claims, pairwise(truthful), strict=True):
        claim = (honest if good else liar).format(whom)
        verdict = true_word if own else false_word
        lines += [f"{_SAYS[language].format(who, claim)} {verdict}", (honest if other else liar).format(whom)]
    query = " ".join([rule, *facts, question.format(names[-1])])
    return Worked(query, "\n".join(lines), yes if truthful[-1] else no)


PUZZLES = DrawnFamily("puzzles", tuple(_PEOPLE), _work, _draw)
