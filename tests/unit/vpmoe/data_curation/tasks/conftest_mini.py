"""Answers to generated questions, worked out again from the question's text alone, in three languages.

Nothing of the generator is used: numbers, names and tables are read out of the words.
"""

import re
from datetime import date, timedelta
from itertools import permutations, product

_FACTORS = {"min": 60, "s": 60, "mm": 10, "cm": 100, "m": 1000, "g": 1000, "kg": 1000, "ml": 1000}
_LARGER = {"min": "h", "s": "min", "mm": "cm", "cm": "m", "m": "km", "g": "kg", "kg": "t", "ml": "l"}
_WEEKDAYS = (
    ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"],
    ["montag", "dienstag", "mittwoch", "donnerstag", "freitag", "samstag", "sonntag"],
    ["lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"],
)
_NAME = r"[A-Z][a-z]+"
_COLOURS = {
    "rot": "red", "rouge": "red", "blau": "blue", "bleu": "blue", "grün": "green", "vert": "green", "gelb": "yellow",
    "jaune": "yellow", "schwarz": "black", "noir": "black", "weiß": "white", "blanc": "white", "braun": "brown",
    "marron": "brown",
}  # fmt: skip


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def solve(row: dict) -> tuple[tuple, str]:
    """What the question asks, free of wording, order and language; and its answer."""
    instance, answer = _SOLVERS[row["exercise"]](row["query"], row["language"])
    return (row["exercise"], *instance), answer


def _sum(query: str, _: str) -> tuple[tuple, str]:
    return tuple(sorted(numbers(query))), str(sum(numbers(query)))


def _difference(query: str, _: str) -> tuple[tuple, str]:
    return tuple(sorted(numbers(query))), str(max(numbers(query)) - min(numbers(query)))


def _maximum(query: str, _: str) -> tuple[tuple, str]:
    return tuple(sorted(numbers(query))), str(max(numbers(query)))


def _product(query: str, _: str) -> tuple[tuple, str]:
    a, b = numbers(query)
    return (min(a, b), max(a, b)), str(a * b)


def _sorted(query: str, _: str) -> tuple[tuple, str]:
    return tuple(sorted(numbers(query))), " ".join(map(str, sorted(numbers(query))))


def _count(query: str, _: str) -> tuple[tuple, str]:
    digit, *items = numbers(query)
    return (digit, *sorted(items)), str(items.count(digit))


def _units(query: str, _: str) -> tuple[tuple, str]:
    amounts = [(int(number), unit) for number, unit in re.findall(r"(\d+) ([a-z]+)", query)]
    if both := re.search(r"\b(\w+) (?:and|und|et) (\w+)", query):
        (amount, smaller), factor = amounts[0], _FACTORS[amounts[0][1]]
        assert both.groups() == (_LARGER[smaller], smaller)
        return ("back", amount, smaller), f"{amount // factor} {both[1]} {amount % factor} {smaller}"
    without = re.sub(r"\d+ [a-z]+", "", query)
    (smaller,) = [word for word in re.findall(r"[a-z]+", without) if word in _FACTORS]
    assert amounts[0][1] == _LARGER[smaller] and all(unit == smaller for _, unit in amounts[1:])
    total = amounts[0][0] * _FACTORS[smaller] + sum(amount for amount, _ in amounts[1:])
    return (*amounts, smaller), str(total)


def _dates(query: str, language: str) -> tuple[tuple, str]:
    found = [date.fromisoformat(each) for each in re.findall(r"\d{4}-\d\d-\d\d", query)]
    rest = numbers(re.sub(r"\d{4}-\d\d-\d\d", "", query))
    if len(found) == 2:
        return tuple(found), str((found[1] - found[0]).days)
    if found:
        return (found[0], *rest), (found[0] + timedelta(rest[0])).isoformat()
    names = _WEEKDAYS[("en", "de", "fr").index(language)]
    (start,) = [names.index(word) for word in re.findall(r"\w+", query.lower()) if word in names]
    answer = names[(start + rest[0]) % 7]
    return (start, *rest), answer if language == "fr" else answer.title()


def _strings(query: str, _: str) -> tuple[tuple, str]:
    single = re.findall(r"(?<!['\w])[b-z](?!['\w])|(?<!['\w])a(?!['\w])", query)
    made_up = _made_up_word(query)
    if shift := numbers(query):
        return (made_up, *shift), "".join(chr((ord(c) - 97 + shift[0]) % 26 + 97) for c in made_up)
    if len(single) == 2:
        swapped = re.search(r"with|mit|avec", query)
        old, new = single[::-1] if swapped else single
        return (made_up, old, new), made_up.replace(old, new)
    return (made_up,), made_up[::-1]


_STRING_WORDS = {
    *("replace", "every", "write", "with", "each", "backwards", "what", "from", "back", "front", "shift", "letter"),
    *("alphabet", "further", "ersetze", "jedes", "durch", "schreibe", "rückwärts", "hinten", "nach", "vorn"),
    *("verschiebe", "jeden", "jedem", "buchstaben", "weiter", "remplace", "chaque", "dans", "écris", "avec", "pour"),
    *("envers", "donne", "début", "décale", "lettre", "plus", "loin"),
}


def _made_up_word(query: str) -> str:
    (word,) = [w for w in re.findall(r"\w{4,}", query.lower()) if w not in _STRING_WORDS]
    return word


def _lookup(query: str, _: str) -> tuple[tuple, str]:
    first, second, question = query.split("\n\n")
    city_of = dict(line.split(" | ") for line in first.splitlines()[1:])
    colour_of = dict(line.split(" | ") for line in second.splitlines()[1:])
    words = re.findall(r"\w+", question)
    asked_names = [word for word in words if word in city_of]
    facts = (tuple(sorted(city_of.items())), tuple(sorted((c, _COLOURS.get(x, x)) for c, x in colour_of.items())))
    if asked_names:
        return (asked_names[0], *facts), colour_of[city_of[asked_names[0]]]
    (colour,) = [word for word in words if word in colour_of.values()]
    (name,) = [name for name, city in city_of.items() if colour_of[city] == colour]
    return (_COLOURS.get(colour, colour), *facts), name


def _puzzles(query: str, language: str) -> tuple[tuple, str]:
    if re.search("always|immer|toujours", query):
        return _who_lies(query, language)
    *clues, question = re.findall(r"[^.?]+[.?]", query)
    pairs = set()
    for clue in clues:
        a, b = re.findall(_NAME, clue)
        pairs.add((a, b) if re.search("faster|schneller|avant", clue) else (b, a))
    names = {name for pair in pairs for name in pair}
    orders = [o for o in permutations(sorted(names)) if all(o.index(a) < o.index(b) for a, b in pairs)]
    assert len(orders) == 1, "the clues leave one order"
    place = 1 if re.search("second|zweit|deuxième", question) else -1
    place = 0 if re.search(r"fastest|schnellsten|premier", question) and place != 1 else place
    return (orders[0], place), orders[0][place]


def _who_lies(query: str, language: str) -> tuple[tuple, str]:
    _, *sentences = re.findall(r"[^.?]+[.?]", query)
    truth = "tells? the truth|sagt die Wahrheit|Sagt .* die Wahrheit|dit la vérité"
    asked = next(iter(re.findall(_NAME, re.sub("^ (Does|Sagt|Est)", "", sentences[-1]))))
    statements = []
    for sentence in sentences[:-1]:
        speaker, _, claim = sentence.rpartition(":")
        who = re.findall(_NAME, speaker)
        whom = re.findall(_NAME, claim.replace("Wahrheit", ""))[0]
        statements.append((who[0] if who else None, whom, bool(re.search(truth, claim))))
    names = sorted({whom for _, whom, _ in statements} | {who for who, _, _ in statements if who})
    answers = set()
    for values in product((True, False), repeat=len(names)):
        honest = dict(zip(names, values, strict=True))
        if all((honest[whom] == claim) == (who is None or honest[who]) for who, whom, claim in statements):
            answers.add(honest[asked])
    assert len(answers) == 1, "the statements leave one answer"
    words = {"en": ("no", "yes"), "de": ("nein", "ja"), "fr": ("non", "oui")}
    return (tuple(sorted(statements, key=str)), asked), words[language][answers.pop()]


_SOLVERS = {
    "addition": _sum,
    "long_addition": _sum,
    "subtraction": _difference,
    "maximum": _maximum,
    "multiplication": _product,
    "sorting": _sorted,
    "counting": _count,
    "units": _units,
    "dates": _dates,
    "strings": _strings,
    "lookup": _lookup,
    "puzzles": _puzzles,
}
