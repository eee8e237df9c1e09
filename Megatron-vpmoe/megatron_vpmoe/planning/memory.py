"""The memory of tensors that live, by category."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor


class Memory:
    """Bytes of storages from when they are made until nothing holds them.

    Attributes:
        total: held now.
    """

    def __init__(self) -> None:
        self.total = 0
        self._held = Counter[str]()
        self._known: dict[int, tuple[Any, str]] = {}

    def by_category(self) -> dict[str, int]:
        """Bytes held now."""
        return dict(+self._held)

    def hold(self, tensor: Tensor, category: str) -> None:
        """Count a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_reference: Any) -> None:
            self._held[self._known.pop(key)[1]] -= size
            self.total -= size

        self._known[key] = weakref.ref(storage, freed), category
        self._held[category] += size
        self.total += size

    def label(self, tensor: Tensor, category: str) -> None:
        """Count a tensor's storage under ``category`` from here on."""
        self.hold(tensor, category)
        storage = tensor.untyped_storage()
        reference, before = self._known[storage._cdata]
        self._held[before] -= storage.nbytes()
        self._held[category] += storage.nbytes()
        self._known[storage._cdata] = reference, category
