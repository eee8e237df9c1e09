"""Text to token ids and back: the o200k Harmony vocabulary, and compact vocabularies cut out of it for small models.

Both offer the one interface of :mod:`vpmoe.tokenizer.interface`; a built dataset says in its manifest which it used,
and :func:`load_tokenizer` gives that one back.
"""

from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.from_dataset import load_tokenizer
from vpmoe.tokenizer.interface import Tokenizer
from vpmoe.tokenizer.o200k_harmony import O200kHarmony

__all__ = ["CompactVocabulary", "O200kHarmony", "Tokenizer", "load_tokenizer"]
