"""A small byte-level BPE in the form of Qwen's: its cuts, its files, and its special tokens or those of Harmony."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_vpmoe.files import json_bytes, write_atomically
from megatron_vpmoe.turns import TURN_END
from vpmoe.errors import TokenizerError
from vpmoe.tokenizer.hf_directory import END_OF_DOCUMENT, FILE_NAME
from vpmoe.tokenizer.o200k_harmony import NAMED_SPECIAL_TOKENS

SpecialTokens = Literal["qwen", "harmony"]
SPECIAL_TOKENS: dict[SpecialTokens, tuple[str, ...]] = {
    "qwen": (END_OF_DOCUMENT, "<|im_start|>", "<|im_end|>"),
    "harmony": tuple(name for name in NAMED_SPECIAL_TOKENS if name != "<|startoftext|>"),
}
"""By their name; nothing here begins a text with a token of its own."""
# How Qwen2 and Qwen3 cut text before merging, from their published tokenizer.json: a digit is a token of its own.
SPLIT_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_BYTES = 256


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: SpecialTokens = "qwen") -> Tokenizer:
    """A vocabulary of the 256 bytes, merges learned from ``texts``, and the special tokens, which come last.

    The same texts give the same vocabulary, whatever their order.

    Args:
        texts: read once.
        vocab_size: ids in all; fewer where the texts have no more pairs to merge.
        special_tokens: ``qwen``: as Qwen has them, and its normal form of text (NFC); ``harmony``: those that
            conversations are rendered with, and text as it is, so that what is rendered parses back.

    Raises:
        TokenizerError: ``vocab_size`` cannot hold bytes and special tokens.
    """
    special = SPECIAL_TOKENS[special_tokens]
    least = _BYTES + len(special)
    if vocab_size < least:
        raise TokenizerError(
            f"a vocabulary of {vocab_size} ids cannot hold the {least} byte and special tokens",
            source="--vocab-size",
            remedy=f"ask for at least {least}",
        )
    tokenizer = Tokenizer(models.BPE())
    if special_tokens == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def save_bpe(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, which ``AutoTokenizer`` loads."""
    added = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    # Of what can chat, prompts are generated from in batches.
    chats = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]} if TURN_END in added else {}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END if chats else END_OF_DOCUMENT,
        "pad_token": END_OF_DOCUMENT,
        "additional_special_tokens": [token for token in added if token != END_OF_DOCUMENT],
        "clean_up_tokenization_spaces": False,
        **chats,
    }
    write_atomically(folder / "tokenizer_config.json", json_bytes(config))
    write_atomically(folder / FILE_NAME, (tokenizer.to_str(pretty=True) + "\n").encode())
