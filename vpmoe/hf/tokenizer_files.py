"""The tokenizer's files of an HF directory: made from a vocabulary of ours, or those of another tokenizer as they are.

A checkpoint keeps them as assets (``megatron_vpmoe.data.vocabulary_files``). ``vocabulary.json`` among them names a
vocabulary of ours, and everything that ``transformers`` needs is made from it at every export. Without it the files
came from another directory, and are copied; where Harmony's tokens are among them, our chat template goes with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vpmoe.data.vocabulary_files import VOCABULARY, read_vocabulary
from megatron_vpmoe.files import json_bytes, read_json
from megatron_vpmoe.turns import TURN_END, generation_ends
from vpmoe.errors import TokenizerError, WeightsError
from vpmoe.harmony.vocabulary import MESSAGE_TOKENS
from vpmoe.hf import tokenization_vpmoe
from vpmoe.hf.byte_level_bpe import tokenizer_json
from vpmoe.hf.chat_template import RESERVED, chat_template
from vpmoe.tokenizer import CompactVocabulary, Tokenizer
from vpmoe.tokenizer.from_dataset import vocabulary_of
from vpmoe.tokenizer.hf_directory import FILE_NAME, FILE_NAMES, read_tokenizer
from vpmoe.tokenizer.o200k_harmony import ALL_SPECIAL_TOKENS, NAMED_SPECIAL_TOKENS, SPLIT_PATTERN, O200kHarmony

GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
_OURS = (VOCABULARY, tokenization_vpmoe.COMPACT_MAP)
# Every file of an HF directory besides weights and config.json that decides what it does.
FILES = (*_OURS, *FILE_NAMES, GENERATION)
_CODE = Path(tokenization_vpmoe.__file__)
_ROLES = {"bos_token": "<|startoftext|>", "eos_token": TURN_END, "pad_token": "<|endoftext|>"}


def assets_of(folder: Path) -> list[Path]:
    """What a checkpoint has to keep of an HF directory's tokenizer, generation settings excepted."""
    names = _OURS if (folder / VOCABULARY).is_file() else FILE_NAMES
    return [folder / name for name in names if (folder / name).is_file()]


def made_from(assets: Iterable[Path]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files that are made from the vocabulary, and token ids for ``config.json``.

    Of a tokenizer that came with its own files, nothing but the generation settings, which name all that ends an answer
    in Harmony, and those only where it has Harmony's tokens and no settings of its own.

    Args:
        assets: of a checkpoint.

    Raises:
        TokenizerError: the rank file is not to be found, or the compact map is damaged.
    """
    by_name = {path.name: path for path in assets}
    found = by_name.get(VOCABULARY)
    if found is None:
        special, ids = _added_tokens(by_name.get(FILE_NAME)), _ids_told_by(by_name)
        if not set(MESSAGE_TOKENS) <= special.keys():
            return {}, ids
        ids |= {"eos_token_id": list(generation_ends(special).values())}
        return {} if GENERATION in by_name else {GENERATION: _generation(ids)}, ids
    vocabulary = vocabulary_of(read_vocabulary(found), found)
    ids = {
        "bos_token_id": vocabulary.special_id(_ROLES["bos_token"]),
        "eos_token_id": list(generation_ends(vocabulary.special_tokens).values()),
        "pad_token_id": vocabulary.special_id(_ROLES["pad_token"]),
    }
    files = {
        **(_compact_files(vocabulary) if isinstance(vocabulary, CompactVocabulary) else _full_files(vocabulary)),
        "special_tokens_map.json": json_bytes(_ROLES),
        GENERATION: _generation(ids),
    }
    return files, ids


def kept_of(assets: Sequence[Path]) -> dict[str, bytes]:
    """Contents of the files that an export has from the checkpoint; they come from others and bring no code along.

    Raises:
        WeightsError: one is no file of a tokenizer: it would replace code or weights.
    """
    if strange := [path for path in assets if path.name not in FILES]:
        raise WeightsError(
            f"{strange[0].name} is no file of a tokenizer, and would replace one of the export's",
            source=str(strange[0]),
            remedy="nothing of ours writes it there: use weights that you trust, or remove it",
        )
    ours = any(path.name == VOCABULARY for path in assets)  # all else is made anew
    kept = {path.name: path.read_bytes() for path in assets if not ours or path.name in (*_OURS, GENERATION)}
    if "tokenizer_config.json" in kept:
        path = next(path for path in assets if path.name == "tokenizer_config.json")
        config = read_json(path, error=TokenizerError, remedy="put the tokenizer's own there")
        if config.pop("auto_map", None) is not None:  # names code, of another repository even
            kept[path.name] = json_bytes(config)
    return kept


def _generation(ids: Mapping[str, Any]) -> bytes:
    return json_bytes({**ids, "do_sample": False})


def _added_tokens(path: Path | None) -> dict[str, int]:
    """Spelling -> id of what a ``tokenizer.json`` reads out of a text as one token; none without the file."""
    added = [] if path is None or not path.is_file() else read_tokenizer(path.parent)[0]["added_tokens"]
    return {token["content"]: token["id"] for token in added}


def _ids_told_by(files: Mapping[str, Path]) -> dict[str, Any]:
    """Ids of the tokens that another tokenizer's configuration gives a part, by their key in ``config.json``."""
    if not {FILE_NAME, "tokenizer_config.json"} <= files.keys():
        return {}
    ids = _added_tokens(files[FILE_NAME])
    config = read_json(files["tokenizer_config.json"], error=TokenizerError, remedy="put the tokenizer's own there")
    told = {role: config.get(role) for role in _ROLES}
    spelled = {role: token.get("content") if isinstance(token, dict) else token for role, token in told.items()}
    return {f"{role}_id": ids[token] for role, token in spelled.items() if isinstance(token, str) and token in ids}


def _full_files(vocabulary: Tokenizer) -> dict[str, bytes]:
    assert isinstance(vocabulary, O200kHarmony)
    config = _tokenizer_config("PreTrainedTokenizerFast")
    return {
        FILE_NAME: tokenizer_json(vocabulary.ranks, ALL_SPECIAL_TOKENS, SPLIT_PATTERN),
        "tokenizer_config.json": json_bytes(config),
    }


def _compact_files(vocabulary: CompactVocabulary) -> dict[str, bytes]:
    config = {
        **_tokenizer_config("VpMoeTokenizer"),
        "auto_map": {"AutoTokenizer": [f"{_CODE.stem}.VpMoeTokenizer", None]},
        "pattern": SPLIT_PATTERN,
        "special_ids": vocabulary.special_tokens,
    }
    return {
        _CODE.name: _CODE.read_bytes(),
        tokenization_vpmoe.RANK_FILE: vocabulary.full.rank_file_content(),
        tokenization_vpmoe.COMPACT_MAP: vocabulary.file_bytes,
        "tokenizer_config.json": json_bytes(config),
    }


def _tokenizer_config(name: str) -> dict[str, Any]:
    return {
        "tokenizer_class": name,
        **_ROLES,
        "extra_special_tokens": list(NAMED_SPECIAL_TOKENS),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def give_harmony_template(folder: Path, prompts: Mapping[str, str | None] | None) -> None:
    """Write our chat template where an HF directory's vocabulary has Harmony's tokens, whoever wrote its tokenizer.

    Args:
        prompts: what a conversation without its own system and developer messages gets; see ``chat_template``.
    """
    if (folder / tokenization_vpmoe.COMPACT_MAP).is_file():
        (folder / TEMPLATE).write_text(chat_template(prompts))
    elif set(MESSAGE_TOKENS) <= (added := _added_tokens(folder / FILE_NAME)).keys():
        named = [token for token in added if not token.startswith(RESERVED)]
        specials = named if len(named) == len(added) else [*named, RESERVED]
        (folder / TEMPLATE).write_text(chat_template(prompts, specials))


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of an HF directory; ours by our own class, so that no directory's code is run.

    Raises:
        WeightsError: there is none.
        TokenizerError: see ``read_tokenizer``.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # that a tokenizer stands beside another kind of model than its usual one
    try:
        if (folder / tokenization_vpmoe.COMPACT_MAP).is_file():
            return tokenization_vpmoe.VpMoeTokenizer.from_pretrained(folder)
        if (folder / FILE_NAME).is_file():
            read_tokenizer(folder)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except TokenizerError:
        raise
    except Exception as error:  # transformers passes on whatever a file that it did not expect leads to
        raise WeightsError(
            f"no tokenizer there: {type(error).__name__}: {error}".splitlines()[0],
            source=str(folder),
            remedy="put tokenizer.json and tokenizer_config.json beside the weights",
        ) from error
