"""What Streamlit runs for every session and every change of a widget: the list of pages, and the chosen one."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import streamlit
from PIL import Image

from megatron_vpmoe.errors import VpmoeError, of_the_system
from vpmoe.app.places import Places
from vpmoe.app.shown import refusal

PAGES = {
    "runs": ("Runs", ":material/show_chart:"),
    "router": ("Router", ":material/grid_on:"),
    "chat": ("Chat", ":material/chat:"),
    "inspector": ("Routing inspector", ":material/account_tree:"),
    "data": ("Data", ":material/dataset:"),
    "evaluation": ("Ladder and evaluation", ":material/checklist:"),
}
"""Module in ``views`` and path of the URL -> title and icon."""

# An image of our own: a named icon would be fetched from elsewhere. Sixteen experts, two of them chosen.
_EXPERTS = np.where(np.isin(np.arange(16), [6, 11]).reshape(4, 4, 1), [255, 140, 0], [70, 110, 180])
_ICON = Image.fromarray(np.kron(_EXPERTS, np.ones((8, 8, 1))).astype(np.uint8))
_STYLE = "<style>.stMainBlockContainer{padding-top:3rem}</style>"


def main() -> None:
    """Show the page that the URL names."""
    streamlit.set_page_config(page_title="vpMoE", page_icon=_ICON, layout="wide")
    streamlit.html(_STYLE)
    pages = [
        streamlit.Page(_shown(name), title=title, icon=icon, url_path=name, default=name == "runs")
        for name, (title, icon) in PAGES.items()
    ]
    streamlit.navigation(pages).run()


def _shown(name: str) -> Callable[[], None]:
    def show() -> None:
        title, _ = PAGES[name]
        streamlit.title(title)
        try:
            importlib.import_module(f"vpmoe.app.views.{name}").show(Places.given())
        except VpmoeError as error:
            refusal(error)
        except OSError as error:
            refusal(of_the_system(error))

    show.__name__ = name
    return show


if __name__ == "__main__":
    main()
