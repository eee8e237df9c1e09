"""``reference_log_p`` ahead of time: log p of each label of a dataset under a frozen model, for DPO."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from megatron_vpmoe.manifest import Manifest, read_manifest
from megatron_vpmoe.sources.annotated import of_documents
from megatron_vpmoe.sources.reference import Reference
from vpmoe.eval.open_model import open_model
from vpmoe.steps import Say
from vpmoe.teacher.annotate import Annotating, Score
from vpmoe.weights.geometry import geometry_of


def annotate_with_reference(
    dataset: Path,
    reference: Path,
    output: Path,
    *,
    bf16: bool | None,
    rows: int,
    overwrite: bool = False,
    quiet: bool = False,
    say: Say,
) -> Manifest:
    """A dataset like ``dataset`` at ``output``, with ``reference_log_p``.

    Args:
        dataset: of token files; every kind.
        reference: as :func:`vpmoe.eval.open_model.open_model` takes it, of the dataset's vocabulary.
        output: folder to make.
        bf16: compute in it or not; None: as the reference's run did, and other models in fp32.
        rows: of ``seq_length`` tokens that are scored together.
        overwrite, quiet, say: see :class:`vpmoe.teacher.annotate.Annotating`.

    Raises:
        CheckpointError, WeightsError: no model there.
        TokenizerError: the vocabularies differ.
        DataError: see :class:`vpmoe.teacher.annotate.Annotating`.
    """
    manifest = read_manifest(dataset)
    with open_model(reference, bf16=bf16) as opened:
        opened.require_vocabulary(manifest)

        def open_scorer() -> AbstractContextManager[Score]:
            annotator = Reference()
            annotator.open(opened.model)
            sizes = {"eod_id": manifest.tokenizer.eod_id, "seq_length": manifest.seq_length, "rows": rows}
            return nullcontext(partial(of_documents, annotator=annotator, **sizes))

        by = {
            "weights_sha256": opened.entry["weights_sha256"],
            "geometry": geometry_of(opened.cfg),
            "bf16": opened.cfg.training.bf16,
            "rows": rows,
        }
        told = {"name": opened.described}
        annotating = Annotating(manifest, Reference.annotations, by, told, open_scorer, inputs=(opened.path,))
        return annotating.make(output, overwrite=overwrite, quiet=quiet, say=say)
