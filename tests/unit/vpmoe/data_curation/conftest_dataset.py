"""What the fixture dataset is built with, and how datasets are compared."""

from pathlib import Path

from vpmoe.data_curation.datasets.plan import BuildOptions

ROWS = 400
OPTIONS = BuildOptions(seq_len=160, valid_fraction=0.05, compact_vocab_size=512)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` but the lock, by relative name."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
