"""What answers are sampled to: the prompts of a stored dataset, or of a file, in an order that is fresh each epoch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_vpmoe.data.cursor import Shuffle
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.files import read_json_lines
from megatron_vpmoe.manifest import VocabularyEntry
from megatron_vpmoe.turns import generation_ends


class Asked(NamedTuple):
    """A prompt, what stands with it for rewards, and its reasoning mode where that is known."""

    ids: Sequence[int]
    row: dict[str, Any]
    mode: str | None = None


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


class FilePrompts(list[Asked]):
    """The prompts of a file.

    Attributes:
        heads: by reasoning mode the ids of the system message that asks for it, with which its prompts begin.
    """

    def __init__(self, prompts: Iterable[Asked], heads: Mapping[str, Sequence[int]]) -> None:
        super().__init__(prompts)
        self.heads = heads

    def in_mode(self, asked: Asked, mode: str) -> Asked:
        """The same prompt in a mode of ``heads``."""
        if asked.mode in (None, mode):
            return asked
        own = len(self.heads[str(asked.mode)])
        return asked._replace(ids=[*self.heads[mode], *asked.ids[own:]], mode=mode)


def open_prompts(dataset: KDDataset, path: str | None, longest: int, modes: Sequence[str] = ()) -> Prompts:
    """The prompts of a file, or of a dataset where ``path`` is None, all of them checked.

    Args:
        dataset: its vocabulary is that of the file too.
        path: of a JSONL file; see :func:`read_prompts`.
        longest: tokens that a prompt may have.
        modes: in which those of a file will be asked.

    Raises:
        DataError: a prompt is longer, or the file is not what it should be.
    """
    if path is not None:
        return read_prompts(Path(path), dataset.manifest.tokenizer, longest, modes)
    if longer := dataset.longer_prompts(longest):
        raise DataError(
            f"{len(longer)} prompts have more than {longest} tokens, and with them the longest answer does not fit "
            f"into a row; the first is that of conversation {longer[0]}",
            source=f"{dataset.manifest.root / dataset.split}",
            remedy=_SHORTER,
        )
    return StoredPrompts(dataset)


_MODES = "write the file with vpmoe data prompts, for a dataset whose system message has a line 'Reasoning: ...'"
_SHORTER = "raise data.seq_length, lower rollouts.rollout_max_new_tokens, or leave such prompts out"


def read_prompts(path: Path, vocabulary: VocabularyEntry, longest: int, modes: Sequence[str] = ()) -> FilePrompts:
    """The prompts of a JSONL file of {"ids": token ids, "row": what rewards read}.

    Its first line may be {"vocabulary": {"name", "rank_file_sha256", "compact_map_sha256"}} and says what the ids mean;
    there may also be "modes", by reasoning mode the ids of the system message that asks for it. Every prompt begins
    with one of them then.

    Args:
        path: the file.
        vocabulary: that it has to be in.
        longest: tokens that a prompt may have, in each of the modes.
        modes: in which the prompts will be asked.

    Raises:
        DataError: there is no prompt, or a line holds something else, an id outside the vocabulary, or too many; or
            the file is of another vocabulary, or does not know a mode.
    """
    remedy = 'a line is {"ids": [token ids of the vocabulary], "row": {what rewards read}}'
    prompts, heads, longest_head = [], dict[str, list[int]](), None
    for number, line in read_json_lines(path, ours=False):
        entry, source = line if isinstance(line, dict) else {}, f"{path}:{number}"
        if number == 1 and "vocabulary" in entry and entry.keys() <= {"vocabulary", "modes"}:
            if entry["vocabulary"] != vocabulary.identity():
                raise DataError(
                    f"prompts in the vocabulary {entry['vocabulary']}, and the dataset's is {vocabulary.identity()}",
                    source=source,
                    remedy="write the prompts in the vocabulary of the dataset",
                )
            told = entry.get("modes", {})
            heads = {str(name): _ids(ids, vocabulary) for name, ids in told.items()} if isinstance(told, dict) else {}
            if not isinstance(told, dict) or not all(heads.values()):
                raise DataError(f"no modes: {str(told)[:80]}", source=source, remedy=_MODES)
            longest_head = max((len(heads[name]) for name in modes if name in heads), default=None)
            continue
        ids, row = _ids(entry.get("ids"), vocabulary), entry.get("row", {})
        if not ids or not isinstance(row, dict):
            raise DataError(f"no prompt: {str(line)[:80]}", source=source, remedy=remedy)
        mode = next((name for name, head in heads.items() if ids[: len(head)] == head), None)
        if heads and mode is None:
            raise DataError("a prompt begins with the system message of no mode", source=source, remedy=_MODES)
        grown = 0 if mode is None or longest_head is None else longest_head - len(heads[mode])
        if len(ids) + grown > longest:
            what = f"a prompt of {len(ids) + grown} tokens, above {longest}"
            raise DataError(what, source=source, remedy=_SHORTER)
        prompts.append(Asked(array("i", ids), row, mode))
    if not prompts:
        raise DataError("the file holds no prompt", source=str(path), remedy=remedy)
    if unknown := [name for name in modes if name not in heads]:
        raise DataError(
            f"the file does not know the reasoning {'modes' if len(unknown) > 1 else 'mode'} {', '.join(unknown)}; "
            f"it knows {', '.join(heads) or 'none'}",
            source=f"{path}, rollouts.curriculum",
            remedy=_MODES,
        )
    return FilePrompts(prompts, heads)


def _ids(found: Any, vocabulary: VocabularyEntry) -> list[int]:
    """Token ids of a line; none where it is something else."""
    are_ids = isinstance(found, list) and all(type(one) is int and 0 <= one < vocabulary.vocab_size for one in found)
    return found if are_ids else []


def in_order(prompts: Prompts, seed: int, first: int, count: int) -> Iterator[tuple[int, Asked]]:
    """Numbers ``first`` to ``first + count`` of the order of the run, with their prompts; each epoch is shuffled."""
    while count:
        epoch, begin = divmod(first, len(prompts))
        here = min(count, len(prompts) - begin)
        places = Shuffle(len(prompts), seed, epoch).between(begin, begin + here).tolist()
        yield from ((number, prompts[place]) for number, place in enumerate(places, first))
        first, count = first + here, count - here
