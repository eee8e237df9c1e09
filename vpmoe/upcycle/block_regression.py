"""Fitting one attention or feed-forward to given outputs on given inputs: regression, without the model's loss.

First the block's last matrix and its bias, in closed form (ridge). Then all of its parameters by Adam on the same
squared error, and the closed form again. What is kept is the best of these by the error over all calibration rows, so
no step makes that worse.

Shapes: N rows (real tokens), C hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vpmoe.errors import UpcycleError

_BETAS = (0.9, 0.99)
_LAST_RATE = 0.01  # of the first


@dataclass(frozen=True)
class Regression:
    """How a block is fitted.

    Attributes:
        ridge: strength of the closed form's penalty, in units of a feature's mean variance.
        steps: of Adam; 0 leaves the closed form.
        learning_rate: at the start, in units of a matrix's root mean square; falls to a hundredth along a cosine.
        seed: of the order of the batches.
    """

    ridge: float
    steps: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Block:
    """A block with its data.

    Attributes:
        module: whose parameters are fitted.
        output: its last linear layer, with a bias.
        run: number of a batch -> the block's output at all positions [..., C].
        rows: of each batch, bool [positions]: the real tokens.
        targets: of each batch, what the output should be there [N, C].
    """

    module: nn.Module
    output: Any
    run: Callable[[int], Tensor]
    rows: Sequence[Tensor]
    targets: Sequence[Tensor]

    def outputs(self, index: int) -> Tensor:
        """Of the real tokens of a batch [N, C]."""
        return self.run(index).flatten(0, -2)[self.rows[index]]

    def error(self) -> float:
        """Norm of the difference from the targets over the norm of the targets, all batches together."""
        with torch.no_grad():
            wrong = sum(float((self.outputs(i) - y).double().square().sum()) for i, y in enumerate(self.targets))
        return math.sqrt(wrong / sum(float(y.double().square().sum()) for y in self.targets))

    def features(self, index: int) -> Tensor:
        """What the last linear layer reads, of the real tokens of a batch: [N, features]."""
        found: list[Tensor] = []

        def keep(_linear: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found.append(arguments[0])

        with self.output.register_forward_pre_hook(keep), torch.no_grad():
            self.run(index)
        return found[0].flatten(0, -2)[self.rows[index]]


def fit(block: Block, how: Regression) -> dict[str, float]:
    """Fit a block in place.

    Raises:
        UpcycleError: the steps diverge.

    Returns:
        the error over all calibration rows at the "start", after "ridge", after "steps" and "steps and ridge" (if there
        are any), and of what was "kept".
    """
    errors = {"start": block.error()}
    best = (errors["start"], _copy(block.module))

    def judge(point: str) -> None:
        nonlocal best
        errors[point] = block.error()
        if errors[point] < best[0]:
            best = (errors[point], _copy(block.module))

    refit_output(block, how.ridge)
    judge("ridge")
    if how.steps:
        descend(block, how)
        judge("steps")
        if not math.isfinite(errors["steps"]):
            raise UpcycleError(
                f"the regression of a block diverges: error {errors['ridge']:.3f} before its steps, not finite after",
                source=f"learning_rate {how.learning_rate}",
                remedy="a smaller learning_rate",
            )
        refit_output(block, how.ridge)
        judge("steps and ridge")
    block.module.load_state_dict(best[1])
    return {**errors, "kept": best[0]}


def refit_output(block: Block, strength: float) -> None:
    """Set the last matrix and its bias to the ridge regression of the targets on what they read."""
    solver = Ridge(block.output.weight.shape[1], block.output.weight.shape[0])
    for index, target in enumerate(block.targets):
        solver.add(block.features(index), target)
    weight, bias = solver.solve(strength)
    with torch.no_grad():
        block.output.weight.copy_(weight)
        block.output.bias.copy_(bias)


def descend(block: Block, how: Regression) -> None:
    """Adam (arXiv 1412.6980) on the squared error, one batch a step, every batch once an epoch in a drawn order.

    The rate of a tensor is in units of its root mean square, that of a linear layer's bias in those of the layer's
    matrix: the same number fits every width.
    """
    groups = _parameter_groups(block.module)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=_BETAS)
    power = sum(float(y.square().sum()) for y in block.targets) / sum(y.numel() for y in block.targets)
    generator = torch.Generator().manual_seed(how.seed)
    order: list[int] = []
    with torch.enable_grad():
        for step in range(how.steps):
            fall = 0.5 * (1 + math.cos(math.pi * step / how.steps))
            for group in optimizer.param_groups:
                group["lr"] = how.learning_rate * group["scale"] * (_LAST_RATE + (1 - _LAST_RATE) * fall)
            order = order or torch.randperm(len(block.targets), generator=generator).tolist()
            index = order.pop()
            loss = (block.outputs(index) - block.targets[index]).square().mean() / power
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    block.module.requires_grad_(False)
    for parameter in block.module.parameters():
        parameter.grad = None


def _parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    parameters = dict(module.named_parameters())
    groups = []
    for name, parameter in parameters.items():
        measure = parameters.get(f"{name.removesuffix('.bias')}.weight", parameter)
        groups.append({"params": [parameter], "scale": float(measure.detach().square().mean().sqrt())})
    return groups


def _copy(module: nn.Module) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in module.state_dict().items()}


class Ridge:
    """Linear least squares y = W x + b with a penalty on W, the intercept b free.

    W minimises sum |y - W x - b|² + ``strength`` · m · N · |W|², where m is the mean variance of a feature: the
    strength has no unit and does not depend on the number of rows. Sums are fp64; the solution is the closed form of
    the centred normal equations. Memory holds one matrix of features by features: F features, T targets, N rows.
    """

    def __init__(self, features: int, targets: int) -> None:
        self.rows = 0
        self._x_F = torch.zeros(features, dtype=torch.float64)
        self._y_T = torch.zeros(targets, dtype=torch.float64)
        self._xx_FF = torch.zeros(features, features, dtype=torch.float64)
        self._xy_FT = torch.zeros(features, targets, dtype=torch.float64)

    def add(self, x_NF: Tensor, y_NT: Tensor) -> None:
        """Count rows in."""
        x, y = x_NF.double(), y_NT.double()
        self.rows += len(x)
        self._x_F += x.sum(0)
        self._y_T += y.sum(0)
        self._xx_FF.addmm_(x.t(), x)
        self._xy_FT.addmm_(x.t(), y)

    def solve(self, strength: float) -> tuple[Tensor, Tensor]:
        """fp64 W [T, F] and b [T].

        Features that never vary get the weight zero: with ``strength`` 0 they would have none that is determined.
        """
        mean_F, mean_T = self._x_F / self.rows, self._y_T / self.rows
        xx = self._xx_FF - self.rows * torch.outer(mean_F, mean_F)
        xy = self._xy_FT - self.rows * torch.outer(mean_F, mean_T)
        diagonal = xx.diagonal().clone()
        constant = diagonal <= torch.finfo(torch.float32).eps * diagonal.max()
        xx[constant], xx[:, constant], xy[constant] = 0.0, 0.0, 0.0
        xx.diagonal().add_(torch.where(constant, 1.0, strength * diagonal.mean()))
        weight_TF = torch.linalg.solve(xx, xy).t()
        return weight_TF, mean_T - weight_TF @ mean_F
