"""Token ids back to text, from the table of pieces that travels with a dataset; training needs no tokenizer."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence

from megatron_vpmoe.errors import TokenizerError
from megatron_vpmoe.manifest import VOCABULARY_REMEDY, Manifest


class TokenPieces:
    """The bytes behind every id: of ordinary tokens their text, of special tokens their spelling, of padding none.

    Args:
        pieces: index = id.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = list(pieces)

    @classmethod
    def load(cls, manifest: Manifest) -> TokenPieces:
        """Read the table that the manifest names.

        Raises:
            TokenizerError: it is missing, has another hash, is not base64 or has not one line an id.
        """
        entry = manifest.tokenizer.pieces
        path, raw = manifest.root / entry.path, manifest.read_vocabulary_file(entry)
        lines = raw.split(b"\n")
        if lines[-1] == b"":
            lines.pop()
        if len(lines) != manifest.tokenizer.padded_vocab_size:
            raise TokenizerError(
                f"{len(lines)} lines for a vocabulary of {manifest.tokenizer.padded_vocab_size}",
                source=str(path),
                remedy=VOCABULARY_REMEDY,
            )
        try:
            return cls([base64.b64decode(line, validate=True) for line in lines])
        except binascii.Error as error:
            raise TokenizerError(
                f"a line is not base64: {error}", source=str(path), remedy=VOCABULARY_REMEDY
            ) from error

    def __len__(self) -> int:
        return len(self._pieces)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The concatenated pieces.

        Raises:
            TokenizerError: an id below 0 or past the table.
        """
        out = []
        for token_id in ids:
            if not 0 <= token_id < len(self._pieces):
                raise TokenizerError(
                    f"token id {token_id} is outside the vocabulary of {len(self._pieces)} ids",
                    remedy="decode with the dataset that the model was trained on",
                )
            out.append(self._pieces[token_id])
        return b"".join(out)

    def decode(self, ids: Iterable[int]) -> str:
        """``decode_bytes`` as UTF-8; bytes that are none, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")
