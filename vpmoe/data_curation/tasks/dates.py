"""Calendar questions: the weekday, the date some days later, and the days between two dates."""

from __future__ import annotations

import random
from calendar import monthrange
from datetime import date, timedelta

from vpmoe.data_curation.tasks.family import DrawnFamily, Instance, Worked

_LEVELS = ("weekday", "days later", "days between")
_FIRST, _LAST = date(2001, 1, 1), date(2039, 12, 31)  # every fourth year is a leap year in here
_WEEKDAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "de": ("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"),
    "fr": ("lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"),
}
_WEEKDAY = {
    "en": ("Today is {day}. Which weekday is it in {days} days?", "Which weekday comes {days} days after a {day}?"),
    "de": (
        "Heute ist {day}. Welcher Wochentag ist in {days} Tagen?",
        "Welcher Wochentag kommt {days} Tage nach einem {day}?",
    ),
    "fr": (
        "Aujourd'hui, c'est {day}. Quel jour de la semaine serons-nous dans {days} jours ?",
        "Quel jour de la semaine vient {days} jours après un {day} ?",
    ),
}
_LATER = {
    "en": ("Which date is {days} days after {first}?", "Add {days} days to {first}."),
    "de": ("Welches Datum ist {days} Tage nach dem {first}?", "Addiere {days} Tage zum {first}."),
    "fr": ("Quelle date vient {days} jours après le {first} ?", "Ajoute {days} jours au {first}."),
}
_BETWEEN = {
    "en": ("How many days are there from {first} to {last}?", "Count the days from {first} to {last}."),
    "de": ("Wie viele Tage sind es vom {first} bis zum {last}?", "Zähle die Tage vom {first} bis zum {last}."),
    "fr": ("Combien de jours y a-t-il du {first} au {last} ?", "Compte les jours du {first} au {last}."),
}
_LEAP = {
    "en": ("leap year", "no leap year", "days"),
    "de": ("Schaltjahr", "kein Schaltjahr", "Tage"),
    "fr": ("année bissextile", "année non bissextile", "jours"),
}


def _draw(level: str, rng: random.Random) -> Instance:
    if level == "weekday":
        return rng.randrange(7), rng.randint(8, 700)
    first = _FIRST + timedelta(rng.randrange((_LAST - _FIRST).days - 90))
    return first.isoformat(), rng.randint(32 if level == "days between" else 2, 90)


def _work(instance: Instance, rng: random.Random, language: str) -> Worked:
    level, start, days = instance
    if level == "weekday":
        return _weekday(start, days, rng, language)
    first = date.fromisoformat(start)
    return (_later if level == "days later" else _between)(first, days, rng, language)


def _weekday(start: int, days: int, rng: random.Random, language: str) -> Worked:
    names, rest = _WEEKDAYS[language], days % 7
    steps = [f"{names[(start + step) % 7]} {step}" for step in range(rest + 1)]
    answer = names[(start + rest) % 7]
    query = rng.choice(_WEEKDAY[language]).format(day=names[start], days=days)
    lines = [f"7 × {days // 7} = {days - rest}", f"{days} - {days - rest} = {rest}", *steps]
    return Worked(query, "\n".join(lines), answer)


def _later(first: date, days: int, rng: random.Random, language: str) -> Worked:
    year, month, day = first.year, first.month, first.day + days
    lines = [f"{first.day} + {days} = {day}"]
    length = _length(lines, year, month, language)
    while day > length:
        lines.append(f"{day} - {length} = {day - length}")
        day -= length
        year, month = _next(year, month)
        length = _length(lines, year, month, language)
    answer = f"{year}-{month:02d}-{day:02d}"
    lines += [f"{day} ≤ {length}", answer]
    query = rng.choice(_LATER[language]).format(days=days, first=first)
    return Worked(query, "\n".join(lines), answer)


def _between(first: date, days: int, rng: random.Random, language: str) -> Worked:
    last, lines = first + timedelta(days), []
    year, month = first.year, first.month
    length = _length(lines, year, month, language)
    count = length - first.day
    lines.append(f"{length} - {first.day} = {count}")
    while _next(year, month) != (last.year, last.month):
        year, month = _next(year, month)
        length = _length(lines, year, month, language)
        lines.append(f"{count} + {length} = {count + length}")
        count += length
    lines.append(f"{count} + {last.day} = {days}")
    query = rng.choice(_BETWEEN[language]).format(first=first, last=last)
    return Worked(query, "\n".join(lines), str(days))


def _length(lines: list[str], year: int, month: int, language: str) -> int:
    """Days of the month, with the lines that say why."""
    leap, no_leap, days_word = _LEAP[language]
    if month == 2:
        lines.append(f"4 × {year // 4} + {year % 4} = {year}: {no_leap if year % 4 else leap}")
    length = monthrange(year, month)[1]
    lines.append(f"{year}-{month:02d}: {length} {days_word}")
    return length


def _next(year: int, month: int) -> tuple[int, int]:
    return (year + 1, 1) if month == 12 else (year, month + 1)


DATES = DrawnFamily("dates", _LEVELS, _work, _draw)
