"""Annotating a dataset ahead of time: a second dataset of the same documents, with sidecars beside them.

The one walk over documents, whoever scores them. It is a keyed step: a kill costs the half minute before it, and what
comes out is the same to the byte. The annotated dataset shares the token files with the one that it is made of (hard
links; copies where it lies on another file system), which stays as it was.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.annotation_files import AnnotationWriter
from megatron_vpmoe.data.batch import Document
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import NonFiniteError
from megatron_vpmoe.manifest import Manifest, read_manifest
from megatron_vpmoe.teacher_records import TeacherRecords
from vpmoe.data_curation import manifest as manifests
from vpmoe.errors import DataError, VpmoeError
from vpmoe.progress import Progress
from vpmoe.steps import Say, Step, Work, run

_VERSION = 1
_SAVE_SECONDS = 30.0
Score = Callable[[Iterable[Document]], Iterator[Sequence[Mapping[str, NDArray[Any]]]]]
"""Documents -> lists of their annotations by name, as declared, in their order; a list for each batch. Gone on with
behind a list, it makes the same lists. Under MEASURED a document may have numbers that are summed over all."""
MEASURED = "measured"
Choose = Callable[[str, int, Document], bool]
"""``(split, number in it, document)``: whether it is scored."""


@dataclass(frozen=True)
class Annotating:
    """What is to be made.

    Attributes:
        dataset: of token files.
        annotations: the declarations of what is made; ``teacher``'s, where there is one.
        by: JSON-able, what decides the numbers besides the documents: hashes of weights, precision, batches.
        told: JSON-able, what else the manifest says of who made them, such as names.
        open_scorer: called once, when something has to be scored.
        inputs: folders that are read besides the dataset.
        teacher: how the records are made that are annotated with; the only ones that a document may be without.
        choose: which documents have them; None: all.
        summary: what the manifest says of the sums of what was measured.
    """

    dataset: Manifest
    annotations: tuple[Annotation, ...]
    by: Mapping[str, Any]
    told: Mapping[str, Any]
    open_scorer: Callable[[], AbstractContextManager[Score]]
    inputs: tuple[Path, ...] = ()
    teacher: TeacherRecords | None = None
    choose: Choose | None = None
    summary: Callable[[NDArray[np.float64]], Mapping[str, Any]] = lambda sums: {}

    def make(self, output: Path, *, overwrite: bool = False, quiet: bool = False, say: Say) -> Manifest:
        """The annotated dataset at ``output``, made, gone on with, or found made.

        Raises:
            DataError: the dataset has such an annotation already, or is damaged.
            NonFiniteError: a score is no number.
            NotOursError, BusyError: see :func:`vpmoe.steps.run`.
        """
        if there := {one.name for one in self.dataset.stored} & {one.name for one in self.annotations}:
            raise DataError(
                f"the dataset has {', '.join(sorted(there))} already",
                source=str(self.dataset.path),
                remedy="annotate the dataset that this one was made of",
            )
        step = Step(
            kind="annotated_dataset",
            version=_VERSION,
            output=output,
            decides={
                "dataset": self.dataset.sha256,
                "annotations": [one.model_dump() for one in self.annotations],
                "by": self.by,
            },
            packages=("torch", "numpy"),
            inputs=(self.dataset.root, *self.inputs),
        )
        run(step, partial(self._make, quiet=quiet), overwrite=overwrite, say=say)
        return read_manifest(output)

    def _make(self, work: Work, *, quiet: bool) -> dict[str, Any]:
        manifest = manifests.read_manifest(self.dataset.root, *manifests.KINDS)
        documents = sum(entry.rows for entry in self.dataset.splits.values())
        before = sum(done.get("documents", 0) for done in work.results.values())
        with (
            self.open_scorer() as score,
            Progress("annotating", documents, unit="documents", done_before=before, quiet=quiet) as progress,
        ):
            for split, entry in manifest["splits"].items():
                (work.folder / split).mkdir(exist_ok=True)
                if not entry["rows"]:
                    continue
                dataset, first = KDDataset(self.dataset, split, seq_length=self.dataset.seq_length), 0
                for shard in entry["shards"]:
                    for name in shard["files"]:
                        _share(self.dataset.root / split / name, work.folder / split / name)
                    shard["files"] |= self._annotate(work, dataset, shard, first, score, progress)
                    first += shard["rows"]
        for name in _named_files(manifest):
            _share(self.dataset.root / name, work.folder / name)
        if self.teacher is None:
            manifest["annotations"] = [
                *manifest.get("annotations", []),
                *(one.model_dump() for one in self.annotations),
            ]
        else:
            manifest["teacher"] = self.teacher.model_dump()
        sums = [np.array(done["measured"]) for done in work.results.values() if done.get("measured")]
        entry = {
            "names": [one.name for one in self.annotations],
            "dataset_sha256": self.dataset.sha256,
            "by": {**self.told, **self.by},
            **self.summary(np.sum(sums, axis=0) if sums else np.zeros(0)),
        }
        manifest["annotated"] = [*manifest.get("annotated", []), entry]
        manifests.write_manifest(work.folder, manifest)
        return {"annotated": entry, "documents": documents}

    def _annotate(
        self, work: Work, dataset: KDDataset, shard: Mapping[str, Any], first: int, score: Score, progress: Progress
    ) -> dict[str, Any]:
        """Sidecars of a shard, from where an interrupted attempt has come; the manifest's entries of their files."""
        key = f"{dataset.split}/{shard['name']}"
        state = work.results.setdefault(key, {"documents": 0, "measured": []})
        if "files" in state:
            return state["files"]
        writers = {
            one.name: AnnotationWriter(
                work.folder / dataset.split,
                shard["name"],
                one,
                state["documents"],
                work.scratch / f"{dataset.split}_{shard['name']}_{one.name}.sizes",
            )
            for one in self.annotations
        }
        saved, done, measured = time.monotonic(), state["documents"], np.array(state["measured"])

        def keep(**more: Any) -> None:
            nonlocal saved
            for writer in writers.values():
                writer.flush()
            work.results[key] = {"documents": done, "measured": measured.tolist(), **more}
            work.save()
            saved = time.monotonic()

        handed: deque[int] = deque()
        try:
            for batch in score(self._chosen(dataset, range(first + done, first + shard["rows"]), handed)):
                begun = done
                for document in batch:
                    number = handed.popleft()
                    done = _pass_over(writers, first, done, number)
                    for name, writer in writers.items():
                        if not np.isfinite(document[name]).all():
                            raise NonFiniteError(
                                f"{name} of document {number} of {dataset.split} is not finite",
                                source=str(self.dataset.root),
                                remedy="the model that scores has diverged, or needs fp32",
                            )
                        writer.add(document[name])
                    done += 1
                    if MEASURED in document:
                        measured = document[MEASURED] + (measured if len(measured) else 0)
                written = sum(writer.bytes for writer in writers.values())
                tokens = int(dataset.lengths[first + begun : first + done].sum())
                progress.add(done - begun, tokens, doing=f"{shard['name']}: {written / 1e6:,.1f} MB")
                if time.monotonic() - saved > _SAVE_SECONDS:
                    keep()
        except VpmoeError:  # a server that died: what it said stays
            keep()
            raise
        done = _pass_over(writers, first, done, first + shard["rows"])
        files = {name: entry for writer in writers.values() for name, entry in writer.close().items()}
        work.results[key] = {"documents": done, "measured": measured.tolist(), "files": files}
        work.save()
        return files

    def _chosen(self, dataset: KDDataset, numbers: range, handed: deque[int]) -> Iterator[Document]:
        """The documents that are scored; ``handed`` gets their numbers."""
        for number in numbers:
            document = dataset[number]
            if self.choose is None or self.choose(dataset.split, number, document):
                handed.append(number)
                yield document


def _pass_over(writers: Mapping[str, AnnotationWriter], first: int, done: int, number: int) -> int:
    """Leave out the documents of a shard before ``number``; returns how many of it are then done."""
    for _ in range(first + done, number):
        for writer in writers.values():
            writer.add(np.empty(0, np.uint8))
    return number - first


def _named_files(manifest: Mapping[str, Any]) -> list[str]:
    """What a manifest names beside its shards: of the vocabulary, and the list of rejects."""
    tokenizer = manifest["tokenizer"]
    named = [file["path"] for file in filter(None, (tokenizer["pieces"], tokenizer["compact_map"]))]
    return [*named, *(file["path"] for file in tokenizer.get("files", ())), manifest["rejects"]["path"]]


def _share(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(file, place)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, place)
