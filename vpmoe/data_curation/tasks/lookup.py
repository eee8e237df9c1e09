"""Two-hop lookup in given tables: from a person to a city to its colour, or back."""

from __future__ import annotations

import random

from vpmoe.data_curation.tasks.family import DrawnFamily, Instance, Worked

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Iris", "Jonas", "Lea", "Max")
_CITIES = ("Berlin", "Dakar", "Dublin", "Lima", "Madrid", "Nairobi", "Oslo", "Paris", "Quito", "Riga")
_COLOURS = {
    "en": ("red", "blue", "green", "yellow", "black", "white", "brown", "orange"),
    "de": ("rot", "blau", "grün", "gelb", "schwarz", "weiß", "braun", "orange"),
    "fr": ("rouge", "bleu", "vert", "jaune", "noir", "blanc", "marron", "orange"),
}
_ROWS = {"3 rows": 3, "6 rows": 6, "backwards": 6}
_HEADINGS = {
    "en": ("name | city", "city | colour"),
    "de": ("Name | Stadt", "Stadt | Farbe"),
    "fr": ("nom | ville", "ville | couleur"),
}
_QUERIES = {
    "en": ("Which colour has the city of {asked}?", "Find the colour of {asked}'s city."),
    "de": ("Welche Farbe hat die Stadt von {asked}?", "Finde die Farbe der Stadt von {asked}."),
    "fr": ("Quelle couleur a la ville où habite {asked} ?", "Trouve la couleur de la ville où habite {asked}."),
}
_BACK = {
    "en": ("Whose city has the colour {asked}?", "Find the person whose city has the colour {asked}."),
    "de": ("Wessen Stadt hat die Farbe {asked}?", "Finde die Person, deren Stadt die Farbe {asked} hat."),
    "fr": ("De qui la ville a-t-elle la couleur {asked} ?", "Trouve la personne dont la ville a la couleur {asked}."),
}


def _draw(level: str, rng: random.Random) -> Instance:
    """``(row asked for, ((name, city, number of the colour), ...))``, rows by name; cities and colours are unequal."""
    count = _ROWS[level]
    names = sorted(rng.sample(NAMES, count))
    colours = rng.sample(range(len(_COLOURS["en"])), count)
    return rng.randrange(count), tuple(zip(names, rng.sample(_CITIES, count), colours, strict=True))


def _work(instance: Instance, rng: random.Random, language: str) -> Worked:
    level, asked, rows = instance
    colours = _COLOURS[language]
    first = [f"{name} | {city}" for name, city, _ in rng.sample(rows, len(rows))]
    second = [f"{city} | {colours[colour]}" for _, city, colour in rng.sample(rows, len(rows))]
    name, city, colour = rows[asked][0], rows[asked][1], colours[rows[asked][2]]
    forth = level != "backwards"
    question = rng.choice((_QUERIES if forth else _BACK)[language]).format(asked=name if forth else colour)
    tables = [_HEADINGS[language][0], *first, "", _HEADINGS[language][1], *second]
    hops = (f"{name} | {city}", f"{city} | {colour}")
    reasoning = "\n".join(hops if forth else hops[::-1])
    return Worked("\n".join([*tables, "", question]), reasoning, colour if forth else name)


LOOKUP = DrawnFamily("lookup", tuple(_ROWS), _work, _draw)
