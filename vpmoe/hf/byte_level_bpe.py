"""o200k's ranks as a ``tokenizer.json``: byte-level BPE for the library ``tokenizers``, with the same ids.

Two differences of form are bridged. ``tokenizers`` writes bytes as printable characters (GPT-2's table), and wants a
list of merges where a rank file has none: any two tokens whose bytes together are a token may merge, the lower rank
first. So every way of cutting a token into two others becomes a merge, in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from vpmoe.hf.tokenization_vpmoe import byte_characters


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens whose bytes together are a token, by that token's rank, then by the parts' ranks."""
    found: list[tuple[bytes, bytes]] = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        found += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return found


def tokenizer_json(ranks: Mapping[bytes, int], specials: Mapping[str, int], pattern: str) -> bytes:
    """Content of ``tokenizer.json``.

    Args:
        ranks: bytes of every ordinary token -> its id.
        specials: spelling of every special token -> its id.
        pattern: how text is cut before merging.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    characters = byte_characters()

    def written(piece: bytes) -> str:
        return "".join(characters[byte] for byte in piece)

    # ignore_merges: a cut that is a token as a whole is that token, as in tiktoken.
    tokenizer = Tokenizer(
        BPE(
            vocab={written(piece): token_id for piece, token_id in ranks.items()},
            merges=[(written(left), written(right)) for left, right in merges(ranks)],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    by_id = sorted(specials, key=specials.__getitem__)
    tokenizer.add_special_tokens([AddedToken(spelling, special=True, normalized=False) for spelling in by_id])
    wrong = [spelling for spelling in by_id if tokenizer.token_to_id(spelling) != specials[spelling]]
    assert not wrong, f"special tokens must follow the ranks without a gap: {wrong[0]}"
    return tokenizer.to_str().encode()
