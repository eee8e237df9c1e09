"""A second device on a machine that has none: tensors that were put there, and what must not meet them."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("xpu", 0)  # not "cuda": on a machine with no GPU, upstream is told that that is the CPU
_MAY_MIX = {"copy_", "__setitem__", "__getitem__", "__set__"}  # torch copies or indexes across devices itself


class PretendedCard(TorchFunctionMode):
    """Tensors made on or moved to ``CARD`` stay on the CPU but say that they lie on it, and so do results of them.

    Attributes:
        met: functions that were given tensors of the card.
    """

    # Held, so that no address is used twice; of all tests, since what the model caches for a device outlives one.
    _memory: ClassVar[dict[int, torch.UntypedStorage]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.met = 0

    def take(self, tensor: Tensor) -> None:
        """Let a tensor's memory count as the card's."""
        storage = tensor.untyped_storage()
        self._memory[storage.data_ptr()] = storage

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the card."""
        return not tensor.is_meta and tensor.untyped_storage().data_ptr() in self._memory

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return CARD if self.holds(args[0]) else func(*args)
        name = getattr(func, "__name__", "")
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()]
        here = [tensor for tensor in tensors if self.holds(tensor)]
        self.met += bool(here)
        # A number (no dimensions) may come from the CPU.
        plain = [tensor for tensor in tensors if tensor.dim() and not self.holds(tensor)]
        if here and plain and name not in _MAY_MIX:
            raise AssertionError(f"{name}: a tensor of the CPU {tuple(plain[0].shape)} meets the card's")
        asked = "cpu" if name == "cpu" else next((leaf for leaf in leaves if _is_device(leaf)), None)
        args, kwargs = tree_map(lambda leaf: torch.device("cpu") if _is_card(leaf) else leaf, (args, kwargs))
        result = func(*args, **kwargs)
        if name == "__set__" or not (here or asked):
            return result
        there = bool(here) if asked is None else _is_card(asked)
        return tree_map(lambda leaf: self._put(leaf, there) if isinstance(leaf, Tensor) else leaf, result)

    def _put(self, tensor: Tensor, there: bool) -> Tensor:
        if tensor.numel() and self.holds(tensor) != there:
            tensor = tensor.clone()
            if there:
                self.take(tensor)
        return tensor


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value in ("cpu", "xpu"))


def _is_card(value: Any) -> bool:
    return _is_device(value) and str(value).startswith("xpu")


def lend(monkeypatch: pytest.MonkeyPatch) -> PretendedCard:
    """Make the pretended card the device that this process computes on; enter what is returned."""
    # All that name it, or one that is first imported meanwhile would keep the card for good.
    from megatron_vpmoe.model import builder
    from megatron_vpmoe.model.attention import self_attention
    from megatron_vpmoe.runtime import device, signals
    from megatron_vpmoe.training import implementation, progress, router, step

    card = PretendedCard()

    def to(module: nn.Module, target: torch.device) -> nn.Module:
        for tensor in [*module.parameters(), *module.buffers()] if _is_card(target) else []:
            card.take(tensor)
        return module

    generator = torch.Generator
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(torch, "Generator", lambda **_: generator())
    for room in (device, builder, signals, implementation, progress, router, step):
        monkeypatch.setattr(room, "current_device", lambda: CARD)
    monkeypatch.setattr(self_attention, "select_backend", lambda *_, **__: "reference")
    return card
