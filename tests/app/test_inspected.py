"""What the inspector's page makes of routing and attention."""

from __future__ import annotations

import numpy as np

from vpmoe.app.inspected import at_edge, routed_html, routing_rows
from vpmoe.eval.inspection import LayerAttention, LayerRouting


def test_the_edge_of_a_window_is_its_farthest_token() -> None:
    weight = np.tril(np.random.default_rng(1).random((2, 14, 14))).astype(np.float32)
    share = np.mean([weight[1, query, query - 7] for query in range(7, 14)])
    assert at_edge(LayerAttention(8, "rope", weight, False), 1) == f"{100 * share:.2f} %"
    for window in (None, 15):
        assert at_edge(LayerAttention(window, "rope", weight, False), 0) == "not reached"


def test_tokens_of_any_text_are_shown_as_text() -> None:
    routing = LayerRouting(4, np.array([[0, 1], [3, 2], [1, 0]]), np.full((3, 2), 0.5, np.float32), np.ones(3, "f4"))
    pieces = ["<script>alert(1)</script>", "\ud800\u202e", '"><img src=x onerror=alert(1)>']
    page = routed_html(pieces, routing)
    assert "<script" not in page and "<img" not in page and "\\ud800" in page and "\\u202e" in page
    assert page.count("<span") == 3 and len(routing_rows(pieces, routing)) == 3
