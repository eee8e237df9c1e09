"""Prompts for rollouts: questions as a model is asked them, each with its row, which rewards read."""

from __future__ import annotations

from pathlib import Path

from megatron_vpmoe.files import json_line, write_atomically
from megatron_vpmoe.manifest import PromptsEntry
from vpmoe.data_curation.rows.source import RowSource
from vpmoe.errors import DataError, RowError
from vpmoe.harmony.conversation import Message, check_text
from vpmoe.harmony.prompts import REASONING_EFFORTS, names_effort, with_reasoning_effort
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.steps import check_replaceable
from vpmoe.tokenizer.interface import Tokenizer

_FIRST = "vocabulary"


def write_prompts(
    questions: RowSource, field: str, output: Path, *, tokenizer: Tokenizer, given: PromptsEntry | None
) -> int:
    """Write the JSONL file that ``rollouts.rollout_prompts`` names; returns how many prompts are in it.

    Its first line says what the ids mean, ``{"vocabulary": identity, "modes": {effort: ids of the system message}}``,
    the modes where the system message has a line of its effort; then come ``{"ids": [...], "row": {...}}``.

    Args:
        questions: rows.
        field: of the row's text that the user says.
        output: replaced where it is such a file.
        tokenizer: the vocabulary that the model was taught in.
        given: the system and developer messages that it was taught under; None: none.

    Raises:
        DataError: a row has no such text or cannot be JSON; or there is no row.
        TokenizerError: the vocabulary has no Harmony tokens.
        NotOursError: something else lies at ``output``.
    """
    check_replaceable(output, f'{{"{_FIRST}": {{')
    renderer, given = FastRenderer(tokenizer), given or PromptsEntry()
    context = [Message(role, text) for role, text in given.model_dump().items() if text]
    system = [Message("system", given.system)] if given.system and names_effort(given.system) else []
    modes = {
        effort: renderer.render(with_reasoning_effort(system, effort)).tokens().tolist()
        for effort in REASONING_EFFORTS
        if system
    }
    lines = [json_line({_FIRST: tokenizer.identity, **({"modes": modes} if modes else {})})]
    for place, row in questions.rows():
        try:
            check_text(row.get(field), field)
            ids = renderer.generation_prompt([*context, Message("user", row[field])]).tolist()
            lines.append(json_line({"ids": ids, "row": row}))
        except (RowError, TypeError) as error:
            what = error.what if isinstance(error, RowError) else f"the row is no JSON: {error}"
            raise DataError(what, source=place, remedy="mend the row, or name the field (--field)") from error
    if len(lines) == 1:
        raise DataError("there are no rows", source=questions.name, remedy="name a file that has some")
    write_atomically(output, "".join(lines).encode())
    return len(lines) - 1
