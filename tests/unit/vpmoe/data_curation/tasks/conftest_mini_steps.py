"""Derivations of generated rows checked line by line: every step has to be true and to follow."""

import re
from itertools import pairwise

_TERM = r"\d+(?: ?[-+×] ?\d+)+"
_BORROW = "(?:borrow|geborgt|retenue)"
_ARITHMETIC = ("addition", "subtraction", "multiplication", "long_addition")


def assert_derived(row: dict) -> None:
    """Every equation is true, every other step follows, and the last line says the answer."""
    lines, answer = row["synthetic_reasoning"].splitlines(), row["synthetic_answer"]
    for line in lines:
        for left, borrow, right in re.findall(rf"({_TERM})(?: {_BORROW} (\d))? ?= ?(\d+(?: \d\b)?)", line):
            assert _value(left) + 10 * int(borrow or 0) == int(right.replace(" ", "")), line
        for left, relation, right in re.findall(r"(\d+) ?([<>≤]) ?(\d+)", line):
            assert {"<": int(left) < int(right), ">": int(left) > int(right), "≤": int(left) <= int(right)}[relation]
    if row["exercise"] == "subtraction":
        _subtraction(lines)
    if row["exercise"] in _ARITHMETIC:
        assert re.sub(r"\D", "", lines[-1]).lstrip("0") == answer.lstrip("0")
        return
    assert re.sub(r"\s", "", answer) in re.sub(r"\s", "", lines[-1]) or row["exercise"] == "puzzles"
    if check := _STEPS.get(row["exercise"]):
        check(row, lines, answer)


def _value(expression: str) -> int:
    return eval(re.sub(r"\s", "", expression).replace("×", "*"))


def _subtraction(lines: list[str]) -> None:
    """The borrow comes before the digit that depends on it, and the tens pay for it."""
    (a_tens, a_ones), (b_tens, b_ones) = (number.split() for number in lines[0].split("-"))
    ones = re.fullmatch(rf"\S+ {a_ones}-{b_ones} {_BORROW} ([01])=(\d)", lines[1])
    assert ones and int(ones[1]) == (int(a_ones) < int(b_ones)), lines[1]
    tens = re.fullmatch(rf"\S+ {a_tens}-{b_tens}-{ones[1]}=(\d)", lines[2])
    assert tens and lines[3].endswith(f" {tens[1]} {ones[2]}"), lines[2:]


def _counting(row: dict, lines: list[str], _: str) -> None:
    digit, *items = re.findall(r"\d", row["query"])
    count = 0
    for item, line in zip(items, lines[:-1], strict=True):
        count += item == digit
        shown, verdict, running = line.split()
        assert (shown, running) == (item, str(count))
        assert (verdict in ("yes", "ja", "oui")) == (item == digit)


def _sorting(row: dict, lines: list[str], _: str) -> None:
    left = re.findall(r"\d", row["query"])
    assert lines[0].split() == left
    for line in lines[1:-1]:
        least, *rest = re.findall(r"\d", line)
        assert least == min(left)
        left.remove(least)
        assert rest == left


def _weekdays(row: dict, lines: list[str], answer: str) -> None:
    if row["constraints"] != "weekday":
        return
    rest = int(lines[1].rpartition(" ")[2])
    assert [int(line.split()[1]) for line in lines[2:]] == list(range(rest + 1)) and rest < 7
    assert lines[2].split()[0] in row["query"] and lines[-1].split()[0] == answer


def _strings(row: dict, lines: list[str], answer: str) -> None:
    word = lines[0].replace(" ", "")
    assert word in row["query"] and lines[-1].replace(" ", "") == answer
    if row["constraints"] == "reverse":
        for moved, line in enumerate(lines[1:-1], 1):
            rest, end = line.replace(" ", "").split("|")
            assert rest + end[::-1] == word and len(end) == moved
        return
    for own, became, line in zip(word, answer, lines[1:-1], strict=True):
        path = line.split()
        assert (path[0], path[-1]) == (own, became)
        if row["constraints"] == "shift":
            assert all((ord(b) - ord(a)) % 26 == 1 for a, b in pairwise(path))


def _lookup(row: dict, lines: list[str], _: str) -> None:
    table = row["query"].splitlines()
    assert len(lines) == 2 and all(line in table for line in lines)
    first, second = (set(line.split(" | ")) for line in lines)
    assert len(first & second) == 1, "the second hop begins where the first ends"


def _puzzles(row: dict, lines: list[str], answer: str) -> None:
    if row["constraints"] == "liars":
        assert (answer in ("no", "nein", "non")) == bool(re.search("lies|lügt|ment", lines[-1]))
        for known, said, learnt in zip(lines[::2], lines[1::2], lines[2::2], strict=False):
            claim, verdict = said.rsplit(". ", 1)
            assert claim + "." in row["query"] and said.startswith(known.split()[0])
            honest = not re.search("lies|lügt|ment", known)
            assert (verdict in ("true", "wahr", "vrai")) == honest
            assert (claim.partition(": ")[2] + "." == learnt) == honest
        return
    clues = [line.split(" > ") for line in lines if line.count(">") == 1]
    for pair in clues:
        assert any(all(name in clue for name in pair) for clue in row["query"].split("."))
    for chain in (line.split(" > ") for line in lines if line.count(">") > 1):
        assert all(list(pair) in clues for pair in pairwise(chain))
    assert answer in lines[-1].split(" > ")


_STEPS = {
    "counting": _counting,
    "sorting": _sorting,
    "dates": _weekdays,
    "strings": _strings,
    "lookup": _lookup,
    "puzzles": _puzzles,
}
