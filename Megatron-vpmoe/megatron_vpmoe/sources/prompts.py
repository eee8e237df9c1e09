"""What answers are sampled to: the prompts of a stored dataset, or of a file, in an order that is fresh each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_vpmoe.data.cursor import shuffled
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.files import read_json_lines
from megatron_vpmoe.turns import generation_ends


class Asked(NamedTuple):
    """A prompt, and what stands with it for rewards."""

    ids: Sequence[int]
    row: Mapping[str, Any]


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


def read_prompts(path: Path, *, vocab_size: int) -> list[Asked]:
    """The prompts of a JSONL file of {"ids", "row"}.

    Raises:
        DataError: there is none, or a line holds something else, or an id outside the vocabulary.
    """
    remedy = 'a line is {"ids": [token ids of the vocabulary], "row": {what rewards read}}'
    prompts = []
    for number, line in read_json_lines(path, ours=False):
        ids, row = (line.get("ids"), line.get("row", {})) if isinstance(line, dict) else (None, None)
        is_prompt = isinstance(ids, list) and all(type(one) is int and 0 <= one < vocab_size for one in ids)
        if not ids or not is_prompt or not isinstance(row, dict):
            raise DataError(f"no prompt: {str(line)[:80]}", source=f"{path}:{number}", remedy=remedy)
        prompts.append(Asked(ids, row))
    if not prompts:
        raise DataError("the file holds no prompt", source=str(path), remedy=remedy)
    return prompts


def in_order(prompts: Prompts, seed: int, first: int, count: int) -> Iterator[tuple[int, Asked]]:
    """Numbers ``first`` to ``first + count`` of the order of the run, with their prompts; each epoch is shuffled."""
    for number in range(first, first + count):
        epoch, place = divmod(number, len(prompts))
        yield number, prompts[int(shuffled(len(prompts), seed, epoch)[place])]
