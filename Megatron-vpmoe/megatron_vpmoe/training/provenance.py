"""Where a run comes from: code, configuration, vocabulary, data, packages; and whether another may continue it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.config import config_hash
from megatron_vpmoe.config.provenance import FieldChange, provenance_diff
from megatron_vpmoe.errors import CheckpointError, DataError
from megatron_vpmoe.files import sha256_of_file
from megatron_vpmoe.manifest import Manifest, read_manifest
from megatron_vpmoe.retrieval.store_format import GROWN_FROM, facts_of
from megatron_vpmoe.software import provenance

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_BINDING = ("tokenizer", "dataset_manifest_sha256", "rollout_prompts_sha256", "store_sha256")


def collect_provenance(cfg: RunConfig, manifests: Sequence[Manifest]) -> dict[str, Any]:
    """What a checkpoint records of its origin; JSON-ready.

    Args:
        manifests: of the run's datasets, which share a vocabulary.

    Returns:
        see :func:`megatron_vpmoe.software.provenance`; and ``rollout_prompts_sha256`` and ``store_sha256`` where there
        is such a file.

    Raises:
        DataError: the store is one that finished conversations are added to.
    """
    if cfg.data.store is not None and GROWN_FROM in facts_of(Path(cfg.data.store)):
        raise DataError(
            "conversations are added to this store, and what is trained with stays as it is",
            source=f"data.store: {cfg.data.store}",
            remedy="train with one that vpmoe data build-store made",
        )
    named = {"rollout_prompts": cfg.rollouts.rollout_prompts, "store": cfg.data.store}
    hashes = [manifest.sha256 for manifest in manifests]
    return {
        **provenance(
            config_hash=config_hash(cfg),
            tokenizer=manifests[0].tokenizer.identity(),
            dataset=hashes[0] if len(hashes) == 1 else hashes,
        ),
        **{f"{name}_sha256": sha256_of_file(Path(path)) for name, path in named.items() if path is not None},
    }


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[FieldChange], list[FieldChange]]:
    """Differences between two origins: those with which the one run cannot soundly continue the other, and the free.

    Model, order and objective fields, vocabulary and dataset bind. Code, package versions and hardware are told but
    free, and of the operational configuration fields nothing is told.

    Args:
        old: {"config": the resolved configuration by section, "provenance": from ``collect_provenance``}.
        new: likewise.
    """
    binding, free = provenance_diff(old["config"], new["config"]), list[FieldChange]()
    before, after = _flat(old["provenance"]), _flat(new["provenance"])
    for key in dict.fromkeys([*before, *after]):
        if key != "config_hash" and before.get(key) != after.get(key):
            kind = binding if key.split(".")[0] in _BINDING else free
            kind.append(FieldChange(key, before.get(key), after.get(key)))
    return binding, free


def check_provenance(state: Mapping[str, Any], cfg: RunConfig, *, source: str) -> list[str]:
    """Whether a run under ``cfg`` may continue the checkpoint with ``state``.

    Args:
        state: holds "config" and "provenance", as for ``compare``.
        source: the checkpoint, for the message.

    Returns:
        a line for each free difference, such as another torch version.

    Raises:
        CheckpointError: there are binding differences; all of them are listed.
        DataError: a dataset that ``cfg`` names cannot be read.
    """
    manifests = [read_manifest(part.path) for part in cfg.data.parts]
    here = {"config": cfg.model_dump(mode="json"), "provenance": collect_provenance(cfg, manifests)}
    binding, free = compare(state, here)
    # Other parameters have no optimizer state in the checkpoint.
    loadable = not any(
        change.key.split(".")[0] in ("model", "moe") or change.key == "training.train_only" for change in binding
    )
    if binding and not (cfg.checkpoint.allow_provenance_change and loadable):
        override = "; --allow-provenance-change continues all the same" if loadable else ""
        raise CheckpointError(
            "the checkpoint belongs to another run (checkpoint -> now):\n    " + "\n    ".join(map(str, binding)),
            source=source,
            remedy=f"set these back to continue it, or take another --run-name to start afresh{override}",
        )
    return [f"changed since the checkpoint: {difference}" for difference in (*binding, *free)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
