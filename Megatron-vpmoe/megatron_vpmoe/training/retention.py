"""Which checkpoints of a run stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_vpmoe.training.checkpoint_files import (
    REMOVABLE,
    Damaged,
    by_age,
    damage,
    give_up,
    is_ours,
    iteration_of,
    names_in,
    set_aside,
)


class Retention:
    """Which checkpoints of a run stay: the newest ones that are sound, multiples, the last written, the one restored.

    Hashes are compared once a run, and only before an older checkpoint would go for the sake of the one in question;
    names and sizes every time.

    Args:
        directory: the run's checkpoints; no other process writes there.
        keep_last: sound checkpoints to keep.
        keep_every: multiples of this stay too.
        restored_from: the checkpoint that the run continues, found sound.
    """

    def __init__(
        self, directory: Path, *, keep_last: int, keep_every: int | None, restored_from: Path | None = None
    ) -> None:
        self._directory, self._keep_last, self._keep_every = directory, keep_last, keep_every
        self._restored_from, self._sound = restored_from, {restored_from}
        self._mixed: set[Path] = set()

    def prune(self, written: Path) -> list[str]:
        """Remove what is no longer kept, now that ``written`` stands; returns lines on what is amiss."""
        self._sound.add(written)
        leftovers = [self._directory / name for name in names_in(self._directory) if REMOVABLE.fullmatch(name)]
        # A link's target is not ours to count on or to remove.
        paths = [path for path in by_age(self._directory) if not path.is_symlink()]
        notes, kept = [], 0
        for path in (*leftovers, *(paths if len(paths) > self._keep_last else [])):
            try:
                if path in leftovers:
                    give_up(path, ignore_errors=False)
                elif kept < self._keep_last or not self._stays(path, written):
                    counts = kept < self._keep_last
                    reason = damage(path, check_hashes=counts and path not in self._sound)
                    if reason is not None:
                        notes.append(f"set aside as {set_aside(path).name}: {Damaged(path, reason)}")
                    elif counts:
                        self._sound.add(path)
                        kept += 1
                    elif not _discard(path):
                        self._mixed.add(path)
                        notes.append(f"{path} stays: it holds files that no save wrote")
            except OSError as error:
                notes.append(f"{path} cannot be pruned: {error}")
        return notes

    def _stays(self, path: Path, written: Path) -> bool:
        is_multiple = self._keep_every is not None and iteration_of(path) % self._keep_every == 0
        return is_multiple or path in (written, self._restored_from) or path in self._mixed


def _discard(path: Path) -> bool:
    """Remove a checkpoint; False: the user put something into it, and it stays."""
    if ours := is_ours(path):
        pruned = path.with_name(f"{path.name}.pruned")
        path.rename(pruned)  # From here on it is no checkpoint, whatever becomes of the removal.
        shutil.rmtree(pruned)
    return ours
