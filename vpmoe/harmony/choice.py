"""The renderers by name."""

from __future__ import annotations

from pathlib import Path

from vpmoe.errors import HarmonyError
from vpmoe.harmony.renderer import FastRenderer, Renderer
from vpmoe.tokenizer.interface import Tokenizer

RENDERERS = ("fast", "official")


def make_renderer(name: str, tokenizer: Tokenizer, rank_file_path: Path | None = None) -> Renderer:
    """The renderer called ``name``: ``fast``, or ``official`` on top of the package openai_harmony.

    Args:
        name: one of :data:`RENDERERS`.
        tokenizer: vocabulary of the ids to write.
        rank_file_path: for ``official``, which loads the ranks itself: where they are, if not in the usual places.

    Raises:
        HarmonyError: another name.
    """
    if name == "fast":
        return FastRenderer(tokenizer)
    if name == "official":
        # Imported here: it loads a second copy of the vocabulary.
        from vpmoe.harmony.official import OfficialRenderer

        return OfficialRenderer(tokenizer, rank_file_path)
    raise HarmonyError(f"unknown renderer {name!r}", source="--renderer", remedy=f"use one of {', '.join(RENDERERS)}")
