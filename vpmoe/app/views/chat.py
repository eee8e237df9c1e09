"""Chat: a conversation with any model, or the same with several of them side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit

from megatron_vpmoe.errors import VpmoeError
from vpmoe.app.models import BESIDE, choices, held, pick_beside, stamp_of
from vpmoe.app.places import Places
from vpmoe.app.shown import empty, refusal, table, text
from vpmoe.app.store import runs_of
from vpmoe.app.talk import Slot, Turn, ask, measure, times_as_fast, turn_html
from vpmoe.harmony.prompts import REASONING_EFFORTS

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

_AS_IS = "as trained"
_FORMS = ("a question in a conversation", "a question in plain text", "plain text to go on with")


def show(places: Places) -> None:
    """The page."""
    runs = runs_of(places)
    settings = _settings()
    if not choices(places, runs):
        empty(
            "No model is at hand. Train one, name one when the app starts, or type the path of one below:",
            "vpmoe quickstart",
            "vpmoe app runs/NAME",
        )
    paths = pick_beside(places, runs, key="chat")
    columns = streamlit.columns(len(paths))
    forms = [_form(number, column) for number, column in enumerate(columns)]
    slots: list[Slot] = streamlit.session_state.setdefault("chat_slots", _new())
    question = streamlit.chat_input("Ask something", key="chat_question")
    if streamlit.button("New conversation", key="chat_reset", icon=":material/restart_alt:"):
        slots[:] = _new()
    # All histories first: what is answered then streams below them, one model after the other.
    asked = []
    for slot, path, form, column in zip(slots, paths, forms, columns, strict=False):
        if path is not None:
            with column:
                slot.with_model((path, stamp_of(path), form))
                for turn in slot.turns:
                    _turn(turn)
                asked.append((slot, path, _in_form(settings, form), streamlit.container()))
    for slot, path, own, place in asked if question else ():
        with place:
            _ask(slot, path, question or "", own)
    if any(slot.turns for slot, *_ in asked):
        _cache([each[:3] for each in asked])


def _new() -> list[Slot]:
    return [Slot() for _ in BESIDE]


def _form(number: int, column: DeltaGenerator) -> str:
    """How a model is given what is asked: stages of one model read it each as it was taught."""
    return column.selectbox(
        "Given as",
        _FORMS,
        key=f"chat_form_{number}",
        persist_state="session",
        help="Plain text is for models that were only pretrained, or know no conversations.",
    )


def _in_form(settings: dict[str, Any], form: str) -> dict[str, Any]:
    """The settings of the sidebar, without those that are of conversations alone where there is none."""
    own = {**settings, "plain": form == _FORMS[1], "passage": form == _FORMS[2]}
    return own if form == _FORMS[0] else {**own, "reasoning": None, "only_valid": False}


def _settings() -> dict[str, Any]:
    """Of the answers, chosen in the sidebar."""
    with streamlit.sidebar:
        streamlit.subheader("Sampling", anchor=False)
        temperature = streamlit.slider(
            "Temperature (0: greedy)", 0.0, 2.0, 0.0, 0.05, key="chat_temperature", persist_state="session"
        )
        top_p = streamlit.slider(
            "Top p", 0.01, 1.0, 1.0, 0.01, key="chat_top_p", persist_state="session", disabled=temperature == 0
        )
        top_k = streamlit.number_input(
            "Top k (0: all)", 0, None, 0, key="chat_top_k", persist_state="session", disabled=temperature == 0
        )
        min_p = streamlit.slider(
            "Min p", 0.0, 1.0, 0.0, 0.01, key="chat_min_p", persist_state="session", disabled=temperature == 0
        )
        seed = streamlit.number_input(
            "Seed", 0, 2**31, 0, key="chat_seed", persist_state="session", disabled=temperature == 0
        )
        longest = streamlit.number_input(
            "New tokens at most", 1, 65536, 256, key="chat_max_new_tokens", persist_state="session"
        )
        streamlit.subheader("Asking", anchor=False)
        effort = streamlit.selectbox(
            "Reasoning effort", [_AS_IS, *REASONING_EFFORTS], key="chat_effort", persist_state="session"
        )
        only_valid = streamlit.toggle("Only valid Harmony", key="chat_only_valid", persist_state="session")
        cached = streamlit.toggle(
            "KV cache",
            value=True,
            key="chat_cached",
            persist_state="session",
            help="Off: every token reads the whole text again.",
        )
    return {
        "draw": {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": int(top_k) or None,
            "min_p": min_p,
            "seed": int(seed),
            "max_new_tokens": int(longest),
        },
        "reasoning": None if effort == _AS_IS else effort,
        "only_valid": only_valid,
        "cached": cached,
    }


def _turn(turn: Turn, place: Any = None) -> None:
    """A turn that has been; ``place``: of an answer that is being written."""
    if place is None:
        with streamlit.chat_message("user"):
            text(turn.question)
        place = streamlit.chat_message("assistant").empty()
    with place.container():
        streamlit.html(turn_html(turn))
        if turn.note:
            text(turn.note, colour="220,150,0")
        if turn.figures:
            text(turn.figures, aside=True)


def _ask(slot: Slot, path: Path, question: str, settings: dict[str, Any]) -> None:
    with streamlit.chat_message("user"):
        text(question)
    place = streamlit.chat_message("assistant").empty()
    try:
        ask(slot, held(path), question, settings, lambda turn: _turn(turn, place))
    except VpmoeError as error:
        with place.container():
            refusal(error)


def _cache(asked: list[tuple[Slot, Path, dict[str, Any]]]) -> None:
    with streamlit.expander("What the KV cache is worth here"):
        tokens = streamlit.number_input("Tokens to generate each way", 2, 1024, 32, key="chat_measure_tokens")
        if not streamlit.button("Measure with and without", key="chat_measure"):
            return
        for (slot, path, settings), column in zip(asked, streamlit.columns(len(asked)), strict=True):
            with column:
                if not slot.turns:
                    streamlit.info("Nothing was asked here yet.")
                    continue
                with streamlit.spinner("Answering the last question both ways …"):
                    rows = measure(held(path), slot.turns[-1].question, settings, int(tokens))
                streamlit.metric("With the cache", times_as_fast(rows))
                table(rows)
        streamlit.caption("Greedy, the last question alone; without a cache each token is a pass over the whole text.")
