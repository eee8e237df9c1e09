"""A conversation for a person: structure dimmed, every channel in its colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_vpmoe.errors import visible
from vpmoe.tokenizer.interface import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

STYLES = {"analysis": "cyan", "final": "bold green"}
_STRUCTURE = "dim"
_OTHER = "default"


def spell(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text of generated ids; one that the vocabulary does not have (a padding row of the embedding) is named."""
    parts: list[str] = []
    waiting: list[int] = []
    for token_id in ids:
        if 0 <= token_id < tokenizer.vocab_size:
            waiting.append(token_id)
            continue
        parts += [tokenizer.decode(waiting), f"<|no token {token_id}|>"]
        waiting = []
    return "".join([*parts, tokenizer.decode(waiting)])


def harmony_text(ids: Sequence[int], tokenizer: Tokenizer) -> Text:
    """Decode ``ids``, valid Harmony or not: special tokens and headers dimmed, contents coloured by channel.

    Control, direction and invisible characters are shown as code points: what a model writes drives no terminal.
    """
    from rich.text import Text

    text = Text()
    style, last_special = _STRUCTURE, ""
    waiting: list[int] = []
    for token_id in ids:
        if not tokenizer.is_special(token_id):
            waiting.append(token_id)
            continue
        between = spell(waiting, tokenizer)
        waiting = []
        text.append(visible(between), style=style)
        special = tokenizer.decode([token_id])
        text.append(special, style=_STRUCTURE)
        style = _STRUCTURE
        if special == "<|message|>":
            style = STYLES.get(between, _OTHER) if last_special == "<|channel|>" else _OTHER
        last_special = special
    text.append(visible(spell(waiting, tokenizer)), style=style)
    return text
