"""A compact vocabulary of o200k for ``transformers``; copied into exported directories, so it imports nothing of ours.

Text is merged by the whole vocabulary's ranks; a token that was not kept is then spelled as its bytes. No list of
merges can say that second step (a BPE that knew the kept tokens only would stop at other cuts), so there is no
``tokenizer.json``: the directory holds the rank file, the map of kept ids, and this class.
"""

import base64
from functools import lru_cache
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
        """Tokens of one cut: merged by rank, the lowest first and of equal ones the leftmost."""
        data = word.encode()
        parts = [data] if data in self._ranks else [bytes([byte]) for byte in data]
        while len(parts) > 1:
            joined = [self._ranks.get(left + right, len(self._ranks)) for left, right in zip(parts, parts[1:])]  # noqa: B905, RUF007
            best = min(joined)
            if best == len(self._ranks):
                break
            at = joined.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
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
