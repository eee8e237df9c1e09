"""docs/architecture.md carries the tables of config/combinations.py, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vpmoe.config.combinations import IDLE, REFUSALS, idle_table, refusal_table
from megatron_vpmoe.config.schema import fields


@pytest.mark.parametrize("table", [refusal_table, idle_table])
def test_the_docs_have_the_table(repository: Path, table) -> None:
    documented = (repository / "docs" / "architecture.md").read_text()
    assert table() in documented, f"docs/architecture.md should have this table:\n{table()}"


def test_the_tables_name_fields_that_exist() -> None:
    for rule in (*REFUSALS, *IDLE):
        assert set(rule.names) <= set(fields())
