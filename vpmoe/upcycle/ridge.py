"""Ridge regression with an intercept, from sums over batches: memory holds one matrix of features by features.

Shapes: N rows, F features, T targets.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Ridge:
    """Linear least squares y = W x + b with a penalty on W, the intercept b free.

    W minimises sum |y - W x - b|² + ``strength`` · m · N · |W|², where m is the mean variance of a feature: the
    strength has no unit and does not depend on the number of rows. Sums are fp64; the solution is the closed form of
    the centred normal equations.
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
