"""Annotating a dataset ahead of time: a second dataset of the same documents, with sidecars beside them.

The one walk over documents, whoever scores them. It is a keyed step: a kill costs the half minute before it, and what
comes out is the same to the byte. The annotated dataset shares the token files with the one that it is made of (hard
links; copies where it lies on another file system), which stays as it was.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from vpmoe.data_curation import manifest as manifests
from vpmoe.errors import DataError
from vpmoe.progress import Progress
from vpmoe.steps import Say, Step, Work, run

_VERSION = 1
_SAVE_SECONDS = 30.0
Score = Callable[[Iterable[Document]], Iterator[Sequence[Mapping[str, NDArray[Any]]]]]
"""Documents -> lists of their annotations by name, as declared, in their order; a list for each batch. Gone on with
behind a list, it makes the same lists."""


@dataclass(frozen=True)
class Annotating:
    """What is to be made.

    Attributes:
        dataset: of token files.
        annotations: the declarations of what is made.
        by: JSON-able, what decides the numbers besides the documents: hashes of weights, precision, batches.
        told: JSON-able, what else the manifest says of who made them, such as names.
        open_scorer: called once, when something has to be scored.
        inputs: folders that are read besides the dataset.
    """

    dataset: Manifest
    annotations: tuple[Annotation, ...]
    by: Mapping[str, Any]
    told: Mapping[str, Any]
    open_scorer: Callable[[], Score]
    inputs: tuple[Path, ...] = ()

    def make(self, output: Path, *, overwrite: bool = False, quiet: bool = False, say: Say) -> Manifest:
        """The annotated dataset at ``output``, made, gone on with, or found made.

        Raises:
            DataError: the dataset has such an annotation already, or is damaged.
            NonFiniteError: a score is no number.
            NotOursError, BusyError: see :func:`vpmoe.steps.run`.
        """
        if there := {one.name for one in self.dataset.annotations} & {one.name for one in self.annotations}:
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
        score = self.open_scorer()
        with Progress("annotating", documents, unit="documents", done_before=before, quiet=quiet) as progress:
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
        manifest["annotations"] = [one.model_dump() for one in (*self.dataset.annotations, *self.annotations)]
        entry = {
            "names": [one.name for one in self.annotations],
            "dataset_sha256": self.dataset.sha256,
            "by": {**self.told, **self.by},
        }
        manifest["annotated"] = [*manifest.get("annotated", []), entry]
        manifests.write_manifest(work.folder, manifest)
        return {"annotated": entry, "documents": documents}

    def _annotate(
        self, work: Work, dataset: KDDataset, shard: Mapping[str, Any], first: int, score: Score, progress: Progress
    ) -> dict[str, Any]:
        """Sidecars of a shard, from where an interrupted attempt has come; the manifest's entries of their files."""
        key = f"{dataset.split}/{shard['name']}"
        state = work.results.get(key, {"documents": 0})
        if "files" in state:
            return state["files"]
        done, folder = state["documents"], work.folder / dataset.split
        lengths = dataset.lengths[first : first + done]
        writers = {one.name: AnnotationWriter(folder, shard["name"], one, lengths) for one in self.annotations}
        saved = time.monotonic()
        for batch in score(dataset[first + row] for row in range(done, shard["rows"])):
            for document in batch:
                for name, writer in writers.items():
                    if not np.isfinite(document[name]).all():
                        raise NonFiniteError(
                            f"{name} of document {first + done} of {dataset.split} is not finite",
                            source=str(self.dataset.root),
                            remedy="the model that scores has diverged, or needs fp32",
                        )
                    writer.add(document[name])
                done += 1
            progress.add(len(batch), int(dataset.lengths[first + done - len(batch) : first + done].sum()))
            if time.monotonic() - saved > _SAVE_SECONDS:
                for writer in writers.values():
                    writer.flush()
                work.results[key] = {"documents": done}
                work.save()
                saved = time.monotonic()
        files = {name: entry for writer in writers.values() for name, entry in writer.close().items()}
        work.results[key] = {"documents": done, "files": files}
        work.save()
        return files


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
