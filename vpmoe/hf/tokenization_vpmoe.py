"""A compact vocabulary of o200k for ``transformers``; copied into exported directories, so it imports nothing of ours.

Text is merged by the whole vocabulary's ranks; a token that was not kept is then spelled as its bytes. No list of
merges can say that second step (a BPE that knew the kept tokens only would stop at other cuts), so there is no
``tokenizer.json``: the directory holds the rank file, the map of kept ids, and this class.
"""

import base64
from functools import lru_cache
from heapq import heapify, heappop, heappush
from pathlib import Path
from shutil import copyfile

import numpy as np
from tokenizers import Regex, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizer

RANK_FILE = "o200k_base.tiktoken"
COMPACT_MAP = "compact_vocab.npy"


def byte_characters():
    """The character that stands for each byte: printable ones for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(0x100 + len(characters) - len(printable))
    return [characters[byte] for byte in range(256)]


def merge(data, ranks):
    """Cut bytes into tokens: the pair of lowest rank is joined first, and of equal ones the leftmost.

    Each join is found on a heap and makes two new pairs, so n bytes take O(n log n) steps.

    Args:
        data: bytes of one cut of the text.
        ranks: bytes of every token, each single byte among them -> its rank.
    """
    if data in ranks:
        return [data]
    size = len(data)
    end = list(range(1, size + 1))  # of the part that starts here
    begin = list(range(-1, size))  # of the part that ends here; -1 where none does

    def pair(left):
        """(rank, start, middle, end) of a part and the next one, if they join."""
        middle = end[left]
        if middle == size:
            return None
        rank = ranks.get(data[left : end[middle]])
        return None if rank is None else (rank, left, middle, end[middle])

    heap = [found for left in range(size) if (found := pair(left)) is not None]
    heapify(heap)
    while heap:
        _, left, middle, stop = heappop(heap)
        if begin[middle] != left or end[middle] != stop:
            continue  # one of the two was joined to another since
        end[left], begin[stop], begin[middle] = stop, left, -1
        for start in (begin[left], left):
            if start >= 0 and (found := pair(start)) is not None:
                heappush(heap, found)
    parts, start = [], 0
    while start < size:
        parts.append(data[start : end[start]])
        start = end[start]
    return parts


class VpMoeTokenizer(PreTrainedTokenizer):
    """Ids of a compact vocabulary.

    Args:
        rank_file: lines of base64 and rank, o200k_base's.
        compact_map: ``.npy``, the full vocabulary's id of each compact id, increasing; bytes first, specials last.
        pattern: how text is cut before merging.
        special_ids: spelling -> compact id of every special token.

    Tokens are written as in byte-level BPE: a printable character for each byte.
    """

    vocab_files_names = {"rank_file": RANK_FILE, "compact_map": COMPACT_MAP}  # noqa: RUF012 - transformers reads it so
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, rank_file, compact_map, pattern, special_ids, **kwargs):
        self._files = {RANK_FILE: rank_file, COMPACT_MAP: compact_map}
        lines = (line.split() for line in Path(rank_file).read_bytes().splitlines())
        self._ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
        kept = np.load(compact_map, allow_pickle=False)
        compact = {int(full): position for position, full in enumerate(kept)}
        self._characters = byte_characters()
        self._byte_of = {character: byte for byte, character in enumerate(self._characters)}
        self._id_of = {self._written(piece): compact[rank] for piece, rank in self._ranks.items() if rank in compact}
        self._token_of = {token_id: token for token, token_id in self._id_of.items()}
        self._cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        self._merge = lru_cache(maxsize=1 << 16)(self._merge_uncached)
        added = {i: AddedToken(spelling, special=True, normalized=False) for spelling, i in special_ids.items()}
        kwargs["added_tokens_decoder"] = added
        kwargs.setdefault("extra_special_tokens", list(special_ids))
        super().__init__(pattern=pattern, special_ids=special_ids, **kwargs)

    @property
    def vocab_size(self):
        """Ordinary and special tokens; rows of the embedding beyond them are padding."""
        return len(self._id_of) + len(self._added_tokens_decoder)

    def get_vocab(self):
        return {**self._id_of, **self._added_tokens_encoder}

    def _tokenize(self, text, **kwargs):
        return [token for word, _ in self._cut.pre_tokenize_str(text) for token in self._merge(word)]

    def _merge_uncached(self, word):
        """Tokens of one cut; the bytes of one that was not kept."""
        parts = merge(word.encode(), self._ranks)
        tokens = [self._written(part) for part in parts]
        return [kept for token in tokens for kept in ([token] if token in self._id_of else token)]

    def _convert_token_to_id(self, token):
        return self._id_of.get(token)

    def _convert_id_to_token(self, index):
        return self._token_of.get(index, "")

    def convert_tokens_to_string(self, tokens):
        special = self._added_tokens_encoder
        pieces = (t.encode() if t in special else bytes(self._byte_of[c] for c in t) for t in tokens)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def _written(self, piece):
        return "".join(self._characters[byte] for byte in piece)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        targets = [Path(save_directory) / f"{prefix}{name}" for name in self._files]
        for source, target in zip(self._files.values(), targets, strict=True):
            if Path(source).resolve() != target.resolve():
                copyfile(source, target)
        return tuple(map(str, targets))
