"""What answers are sampled to: the prompts of a stored dataset, or of a file, in an order that is fresh each epoch."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_vpmoe.data.cursor import Shuffle
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.files import read_json_lines
from megatron_vpmoe.manifest import VocabularyEntry
from megatron_vpmoe.turns import generation_ends


class Asked(NamedTuple):
    """A prompt, and what stands with it for rewards."""

    ids: Sequence[int]
    row: dict[str, Any]


class Prompts(Protocol):
    """Prompts by place."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> Asked: ...


class StoredPrompts:
    """The prompts of a dataset's conversations; rows hold the stored answer of the first turn, "answer_ids"."""

    def __init__(self, dataset: KDDataset) -> None:
        self._dataset = dataset
        tokenizer = dataset.manifest.tokenizer
        self._ends = {*generation_ends(tokenizer.special_tokens).values(), tokenizer.eod_id}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: int, /) -> Asked:
        document = self._dataset[place]
        prompt = document.prompt.tolist()
        answer = document.labels.tolist()[len(prompt) - 1 :]
        end = next((place for place, token in enumerate(answer) if token in self._ends), len(answer))
        return Asked(prompt, {"answer_ids": answer[: end + 1]})


def open_prompts(dataset: KDDataset, path: str | None, longest: int) -> Prompts:
    """The prompts of a file, or of a dataset where ``path`` is None, all of them checked.

    Args:
        dataset: its vocabulary is that of the file too.
        path: of a JSONL file; see :func:`read_prompts`.
        longest: tokens that a prompt may have.

    Raises:
        DataError: a prompt is longer, or the file is not what it should be.
    """
    if path is not None:
        return read_prompts(Path(path), dataset.manifest.tokenizer, longest)
    if longer := dataset.longer_prompts(longest):
        raise DataError(
            f"{len(longer)} prompts have more than {longest} tokens, and with them the longest answer does not fit "
            f"into a row; the first is that of conversation {longer[0]}",
            source=f"{dataset.manifest.root / dataset.split}",
            remedy=_SHORTER,
        )
    return StoredPrompts(dataset)


_SHORTER = "raise data.seq_length, lower rollouts.rollout_max_new_tokens, or leave such prompts out"


def read_prompts(path: Path, vocabulary: VocabularyEntry, longest: int) -> list[Asked]:
    """The prompts of a JSONL file of {"ids": token ids, "row": what rewards read}.

    Its first line may be {"vocabulary": {"name", "rank_file_sha256", "compact_map_sha256"}} and says what the ids mean.

    Raises:
        DataError: there is no prompt, or a line holds something else, an id outside the vocabulary, or too many; or
            the file is of another vocabulary.
    """
    remedy = 'a line is {"ids": [token ids of the vocabulary], "row": {what rewards read}}'
    prompts = []
    for number, line in read_json_lines(path, ours=False):
        entry, source = line if isinstance(line, dict) else {}, f"{path}:{number}"
        if number == 1 and entry.keys() == {"vocabulary"}:
            if entry["vocabulary"] != vocabulary.identity():
                raise DataError(
                    f"prompts in the vocabulary {entry['vocabulary']}, and the dataset's is {vocabulary.identity()}",
                    source=source,
                    remedy="write the prompts in the vocabulary of the dataset",
                )
            continue
        ids, row = entry.get("ids"), entry.get("row", {})
        of_vocabulary = isinstance(ids, list) and all(
            type(one) is int and 0 <= one < vocabulary.vocab_size for one in ids
        )
        if not ids or not of_vocabulary or not isinstance(row, dict):
            raise DataError(f"no prompt: {str(line)[:80]}", source=source, remedy=remedy)
        if len(ids) > longest:
            raise DataError(f"a prompt of {len(ids)} tokens, above {longest}", source=source, remedy=_SHORTER)
        prompts.append(Asked(array("i", ids), row))
    if not prompts:
        raise DataError("the file holds no prompt", source=str(path), remedy=remedy)
    return prompts


def in_order(prompts: Prompts, seed: int, first: int, count: int) -> Iterator[tuple[int, Asked]]:
    """Numbers ``first`` to ``first + count`` of the order of the run, with their prompts; each epoch is shuffled."""
    while count:
        epoch, begin = divmod(first, len(prompts))
        here = min(count, len(prompts) - begin)
        places = Shuffle(len(prompts), seed, epoch).between(begin, begin + here).tolist()
        yield from ((number, prompts[place]) for number, place in enumerate(places, first))
        first, count = first + here, count - here
