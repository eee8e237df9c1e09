"""What a run's weights carry to an export: of the checkpoint that they came from, or of the run's dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_vpmoe.data.vocabulary_files import another_vocabulary, identity_of, vocabulary_files
from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.manifest import Manifest
from megatron_vpmoe.training import checkpoint
from megatron_vpmoe.training.suites import prompts_of

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


def carried_by(started_from: checkpoint.Found | None, manifests: list[Manifest], cfg: RunConfig) -> checkpoint.Carried:
    """What the weights brought along; where they brought no vocabulary, the dataset's.

    Raises:
        CheckpointError: the weights mean another vocabulary than the dataset.
        TokenizerError: a file of the dataset's vocabulary is damaged.
    """
    carried, manifest = checkpoint.Carried.of(started_from), manifests[0]
    of_dataset = vocabulary_files(manifest)
    prompts = prompts_of(manifests)
    state = {**carried.state, **({"prompts": prompts.model_dump()} if prompts else {})}
    source = str(started_from.path if started_from else cfg.checkpoint.load_weights or cfg.checkpoint.load_embedding)
    if identity_of(carried.assets, source) is None:
        return checkpoint.Carried(state, {**of_dataset, **carried.assets})
    other = another_vocabulary(carried.assets, manifest, source)
    if not other:
        return checkpoint.Carried(state, carried.assets)
    if not cfg.checkpoint.allow_provenance_change:
        raise CheckpointError(
            other,
            source=source,
            remedy="build the dataset with the weights' vocabulary; --allow-provenance-change trains on the dataset's",
        )
    return checkpoint.Carried(state, of_dataset)
