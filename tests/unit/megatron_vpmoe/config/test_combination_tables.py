"""docs/architecture.md carries the tables of config/rules.py, word for word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_vpmoe.config.rule import Rule
from megatron_vpmoe.config.rules import ARCHITECTURE, IDLE, RULES, RUN, table
from megatron_vpmoe.config.schema import fields


@pytest.mark.parametrize("rules", [ARCHITECTURE, RUN, IDLE], ids=["architecture", "run", "idle"])
def test_the_docs_have_the_table(repository: Path, rules: Sequence[Rule]) -> None:
    documented = (repository / "docs" / "architecture.md").read_text()
    assert table(rules) in documented, f"docs/architecture.md should have this table:\n{table(rules)}"


def test_the_tables_name_fields_that_exist() -> None:
    for rule in RULES:
        assert set(rule.names) <= set(fields())
