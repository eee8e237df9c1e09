"""A torch optimizer over this rank's pieces of the parameters, as a MegatronOptimizer.

It takes the place of upstream's ``FP32Optimizer`` and ``Float16OptimizerWithFloat16Params``: where a parameter is bf16
the piece has an fp32 master, where it is fp32 the torch optimizer works on the parameter's own memory. Masters and
state exist for this rank's pieces alone.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.optim.matrix_stacks import copy_each
from megatron_vpmoe.optim.normuon import Moved, NorMuon
from megatron_vpmoe.optim.sharded_state import piece_sharding, sharding_of_parameters
from megatron_vpmoe.runtime import device
from megatron_vpmoe.runtime.sharded_data_parallel import Piece

device.prepare()
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig  # noqa: E402
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate  # noqa: E402
from megatron.core.transformer.module import param_is_not_shared  # noqa: E402

MASTER = "fp32_param"
"""Name of the master weights among the state in a checkpoint."""

_BLOCK_BYTES = 256 * 2**20
"""What is copied at a time where AdamW's updates are measured; a larger piece is copied alone."""

_ATTRIBUTES = ("allreduce", "matrix_rows", "partition_dim", "partition_stride", "shared", "tensor_model_parallel")


class ShardedOptimizer(MegatronOptimizer):
    """One rank's share of a set of parameters.

    Args:
        groups: parameter groups of whole model parameters; replaced by this rank's pieces.
        build: makes the torch optimizer of the groups.
        initialize_state: creates missing state, as the first step would.
        config: upstream's.
        pieces: of all parameters, what this rank updates, in the order in which it is sent.
        tp_group: decides which rank counts a gradient that tensor-parallel ranks share.
        expert: whether these are routed experts' parameters.
        gathers_rows: row statistics are over whole rows also where tensor-parallel ranks split the columns.
    """

    is_stub_optimizer = False

    def __init__(
        self,
        groups: list[dict[str, Any]],
        build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        initialize_state: Callable[[torch.optim.Optimizer], None],
        config: OptimizerConfig,
        *,
        pieces: Iterable[Piece],
        tp_group: dist.ProcessGroup,
        expert: bool,
        gathers_rows: bool = False,
    ) -> None:
        place = {param: place for place, group in enumerate(groups) for param in group["params"]}
        self.pieces = sorted((piece for piece in pieces if piece.param in place), key=lambda p: place[p.param])
        self._held = [(piece, _leaf(piece)) for piece in self.pieces]
        self._piece_of: dict[torch.Tensor, Piece] = {leaf: piece for piece, leaf in self._held}
        for number, group in enumerate(groups):
            group["params"] = [leaf for piece, leaf in self._held if place[piece.param] == number]
        super().__init__(build(groups), config, initialize_state)
        self.tp_group, self.expert, self._gathers_rows = tp_group, expert, gathers_rows

    @property
    def model_params(self) -> list[torch.nn.Parameter]:
        """The parameters of which this rank has a piece, in the order of ``get_parameters``."""
        return [piece.param for piece in self.pieces]

    def counted(self) -> dict[torch.Tensor, torch.nn.Parameter]:
        """The parameter of each piece that this rank counts in a norm over all ranks, as upstream does."""
        return {
            leaf: piece.param
            for piece, leaf in self._held
            if param_is_not_shared(leaf) and param_is_not_tensor_parallel_duplicate(leaf, self.tp_group)
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; the buffers behind them are zeroed by DDP."""
        for piece, leaf in self._held:
            piece.param.grad = leaf.grad = None

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Point every piece to its part of the gradient; False: nothing is looked at here."""
        for piece, leaf in self._held:
            grad = getattr(piece.param, "main_grad", piece.param.grad)
            leaf.grad = None if grad is None else piece.of(grad).to(leaf.dtype)
        return False

    @torch.no_grad()
    def step_with_ready_grads(
        self, updated: Callable[[list[Piece]], None] = lambda _: None, moved: Moved | None = None
    ) -> bool:
        """Update this rank's pieces.

        Args:
            updated: called with pieces as soon as their weights are the new ones, in all with each once.
            moved: told of every piece's update; None: nothing is measured.
        """
        left: dict[torch.Tensor, int] = {leaf: leaf.numel() for _, leaf in self._held}
        piece_of = self._piece_of

        def stepped(parts: list[tuple[torch.Tensor, int]]) -> None:
            for leaf, elements in parts:
                left[leaf] -= elements
            done = [leaf for leaf in dict.fromkeys(leaf for leaf, _ in parts) if not left[leaf]]
            apart = [leaf for leaf in done if _apart(piece_of[leaf])]
            if apart:
                own = [piece_of[leaf].of(piece_of[leaf].param.data) for leaf in apart]
                copy_each(own, [leaf.data for leaf in apart])
            updated([piece_of[leaf] for leaf in done])

        if isinstance(self.optimizer, NorMuon):
            self.optimizer.step(stepped=stepped, moved=moved)
        elif moved is None:
            self.optimizer.step()
        else:
            self._step_in_blocks(moved)
        stepped([(leaf, elements) for leaf, elements in left.items() if elements])  # those without a gradient too
        return True

    def _step_in_blocks(self, moved: Moved) -> None:
        """The same step of an optimizer by elements, block by block: before it a block is copied, and no more."""
        grads = {leaf: leaf.grad for _, leaf in self._held if leaf.grad is not None}
        for leaf in grads:
            leaf.grad = None
        for block in _blocks(list(grads)):
            before = [torch.empty_like(leaf) for leaf in block]
            copy_each(before, [leaf.data for leaf in block])
            for leaf in block:
                leaf.grad = grads[leaf]
            self.optimizer.step()
            torch._foreach_sub_(before, [leaf.data for leaf in block])
            moved(block, before)
            for leaf in block:
                leaf.grad = None
        for leaf, grad in grads.items():
            leaf.grad = grad

    def reload_model_params(self, state_dict: dict[str, Any] | None = None) -> None:
        """Masters from the model's weights: after weights were loaded without optimizer state."""
        if state_dict is not None:
            raise ValueError("masters are taken from the model")
        with torch.no_grad():
            for piece, leaf in self._held:
                if _apart(piece):
                    leaf.copy_(piece.of(piece.param.data))

    def get_loss_scale(self) -> torch.Tensor:
        """One: bf16 and fp32 need no scale."""
        return torch.ones(1, device=device.current_device())

    def step(self) -> tuple[bool, float, None]:
        """Refused: the norm to clip to is that of the whole model, which ``VpOptimizer`` knows."""
        raise NotImplementedError("step through VpOptimizer")

    def state_dict(self) -> dict[str, Any]:
        """The torch optimizer's, for this rank's pieces; checkpoints go through ``sharded_state_dict``."""
        return self.optimizer.state_dict()

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """State and masters of the pieces with a sharding for each tensor; missing state is created.

        The files know whole parameters alone, so that they load under any division. Parameter groups (learning rates,
        decays) are not stored: a run's own configuration is the truth about them. Neither is ``step``, which is the
        same for all parameters and ``VpOptimizer``'s to store.

        Args:
            model_sharded_state_dict: of the unwrapped model; its tensors are the parameters themselves.
            is_loading: no difference here: saving and loading ask for the same tensors.
            metadata: no difference here either.

        Raises:
            CheckpointError: a parameter that the model's sharded state dict does not hold.
        """
        self.init_state_fn(self.optimizer)
        shardings = sharding_of_parameters(model_sharded_state_dict, self.model_params)
        return {
            str(index): {
                name: piece_sharding(sharding, piece, tensor, name, whole_rows=self._gathers_rows)
                for name, tensor in self._tensors(piece, leaf).items()
            }
            for index, ((piece, leaf), sharding) in enumerate(zip(self._held, shardings, strict=True))
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``sharded_state_dict``'s tensors were read into.

        Raises:
            CheckpointError: a tensor is missing.
        """
        self.init_state_fn(self.optimizer)
        with torch.no_grad():
            for index, (piece, leaf) in enumerate(self._held):
                loaded = state_dict.get(str(index), {})
                for name, tensor in self._tensors(piece, leaf).items():
                    if name not in loaded:
                        raise CheckpointError(
                            f"the loaded state has no {name} for a parameter of shape {tuple(piece.param.shape)}",
                            remedy="hand over what was loaded for this optimizer's sharded_state_dict",
                        )
                    tensor.copy_(loaded[name])

    def _tensors(self, piece: Piece, leaf: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors = {name: value for name, value in self.optimizer.state[leaf].items() if name != "step"}
        return tensors | {MASTER: leaf.data} if _apart(piece) else tensors


def _apart(piece: Piece) -> bool:
    """Whether the piece's fp32 values live in a master instead of the parameter."""
    return piece.param.dtype != torch.float32 and piece.param.dtype != torch.float64


def _blocks(leaves: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Runs of ``leaves`` of ``_BLOCK_BYTES`` at the most, or of one."""
    block: list[torch.nn.Parameter] = []
    size = 0
    for leaf in leaves:
        if block and size + leaf.nbytes > _BLOCK_BYTES:
            yield block
            block, size = [], 0
        block.append(leaf)
        size += leaf.nbytes
    if block:
        yield block


def _leaf(piece: Piece) -> torch.nn.Parameter:
    """What the torch optimizer updates for a piece."""
    if piece.whole and not _apart(piece):
        return piece.param
    part = piece.of(piece.param.data)
    leaf = torch.nn.Parameter(part.float() if _apart(piece) else part)
    for name in _ATTRIBUTES:
        if hasattr(piece.param, name):
            setattr(leaf, name, getattr(piece.param, name))
    return leaf
