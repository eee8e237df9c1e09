"""Greedy answers to pinned prompts, stored in a report, and where those of two models part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from megatron_vpmoe.errors import visible
from vpmoe.errors import DataError
from vpmoe.eval.reports import read_report
from vpmoe.eval.suites.suite_report import KIND
from vpmoe.toml_file import validated

_SHOWN = 40  # characters


class Output(BaseModel):
    """An answer: what was asked, the new ids and their text, and whether it ended by itself."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    ids: tuple[int, ...]
    text: str
    ended: bool


class Outputs(BaseModel):
    """The answers of a model by the names of the prompts, and what decides how they are compared."""

    model_config = ConfigDict(frozen=True)

    checkpoint: dict[str, Any]
    vocabulary: dict[str, str]
    asked: dict[str, Any]
    pinned: dict[str, Output]

    @classmethod
    def read(cls, path: Path) -> Outputs:
        """Of a report of the canaries.

        Raises:
            DataError: there is none at ``path``, or it holds no answers.
        """
        remedy = "make it again: vpmoe eval canaries WHERE"
        return validated(cls, read_report(path, KIND), error=DataError, source=str(path), remedy=remedy)

    @model_validator(mode="before")
    @classmethod
    def _of_a_report(cls, told: dict[str, Any]) -> dict[str, Any]:
        """Its vocabulary is told by the block of provenance; older ones say it themselves."""
        return {"vocabulary": (told.get("provenance") or {}).get("tokenizer"), **told}


def difference(ours: Outputs, theirs: Outputs) -> dict[str, Any]:
    """Where answers part: at which token, or with two vocabularies at which character, from 0.

    An answer that was cut agrees with a longer one that begins with it. Prompts of the same name and another text are
    not compared.

    Returns:
        ``checkpoint`` of the other model, ``unit``, whether both were ``asked_alike``, ``compared`` and ``changed``
        (numbers), and by prompt in ``changes``: ``at``, and what ``now`` and ``before`` stand from there on.
    """
    unit = "token" if ours.vocabulary == theirs.vocabulary else "character"
    shared = [name for name, one in ours.pinned.items() if _prompt_of(theirs, name) == one.prompt]
    changes: dict[str, dict[str, Any]] = {}
    for name in shared:
        answers = ours.pinned[name], theirs.pinned[name]
        character = _parting("text", *answers)
        at = _parting("ids", *answers) if unit == "token" else character
        if at is not None:
            place = min(len(one.text) for one in answers) if character is None else character
            now, before = (one.text[place : place + _SHOWN] for one in answers)
            changes[name] = {"at": at, "now": now, "before": before}
    return {
        "checkpoint": theirs.checkpoint,
        "unit": unit,
        "asked_alike": ours.asked == theirs.asked,
        "compared": len(shared),
        "changed": len(changes),
        "changes": changes,
    }


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """:func:`difference` for a person; what models wrote is made visible."""
    of = found["checkpoint"].get("run")
    alike = "" if found["asked_alike"] else ", which was asked otherwise (form or messages)"
    lines = [f"{found['changed']} of {found['compared']} pinned answers are other than those of {of}{alike}"]
    for name, change in found["changes"].items():
        now, before = (visible(change[key]).replace("\n", "\\n") or "(the end)" for key in ("now", "before"))
        lines.append(f"  {name:<14}from {found['unit']} {change['at']}: {now}   before: {before}")
    return lines


def _prompt_of(outputs: Outputs, name: str) -> str | None:
    return outputs.pinned[name].prompt if name in outputs.pinned else None


def _parting(field: Literal["ids", "text"], one: Output, other: Output) -> int | None:
    """The first place at which two answers differ; None: they do not, as far as they go."""
    left, right = getattr(one, field), getattr(other, field)
    shorter = min(len(left), len(right))
    at = next((place for place in range(shorter) if left[place] != right[place]), shorter)
    ends = (one if len(left) < len(right) else other).ended
    return None if at == shorter and (len(left) == len(right) or not ends) else at
