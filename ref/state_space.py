"""A model of state space layers, slowly, from its formulas: token ids and weights in, logits out, one token at a time.

Nothing of the product is used. A packed row is what it means to be: each document is run alone, and padding is not run
at all. Each channel of each token goes through its recurrence by itself. Formulas: S6 and the block around it, Gu and
Dao 2023 (arXiv 2312.00752, algorithm 2 and figure 3); RMSNorm, arXiv 1910.07467.

Shapes: T tokens of one document, H hidden, I channels, N numbers of state a channel, K taps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def scan(step_TI: Tensor, x_TI: Tensor, a_NI: Tensor, b_TN: Tensor, c_TN: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(step_t A) h_(t-1) + step_t B_t x_t, y_t = C_t h_t, of one document; y [T, I] and the last h [N, I]."""
    h_NI, out = torch.zeros_like(a_NI), []
    for t in range(len(x_TI)):
        h_NI = torch.exp(step_TI[t] * a_NI) * h_NI + torch.outer(b_TN[t], step_TI[t] * x_TI[t])
        out.append(c_TN[t] @ h_NI)
    return torch.stack(out), h_NI


def logits(weights: Mapping[str, Tensor], tokens: list[int], documents: list[int], epsilon: float) -> Tensor:
    """[S, V] of one packed row, zeros on padding (document -1); the output projection is the embedding."""
    table = weights["embedding.word_embeddings.weight"]
    out = table.new_zeros(len(tokens), len(table))
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("decoder.layers."))
    for document in sorted({*documents} - {-1}):
        own = [place for place, of in enumerate(documents) if of == document]
        x_TH = table[torch.tensor([tokens[place] for place in own])]
        for layer in range(layers):
            prefix = f"decoder.layers.{layer}."
            normed = _norm(x_TH, weights[prefix + "input_layernorm.weight"], epsilon)
            x_TH = x_TH + _mixer({k.removeprefix(prefix + "mixer."): v for k, v in weights.items()}, normed)
        out[own] = _norm(x_TH, weights["decoder.final_layernorm.weight"], epsilon) @ table.T
    return out


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _mixer(w: Mapping[str, Tensor], x_TH: Tensor) -> Tensor:
    inner, taps = w["conv_weight"].shape
    states, rank = len(w["A_log"]), w["dt_proj.weight"].shape[1]
    both = x_TH @ w["in_proj.weight"].T
    entered, gate = both[:, :inner], both[:, inner:]
    convolved = []
    for t in range(len(x_TH)):
        sum_I = w["conv_bias"]
        for tap in range(taps):
            if (before := t - (taps - 1 - tap)) >= 0:
                sum_I = sum_I + w["conv_weight"][:, tap] * entered[before]
        convolved.append(sum_I)
    u = _silu(torch.stack(convolved))
    chosen = u @ w["x_proj.weight"].T
    step = torch.log1p(torch.exp(chosen[:, :rank] @ w["dt_proj.weight"].T + w["dt_bias"]))
    b, c = chosen[:, rank : rank + states], chosen[:, rank + states :]
    y, _ = scan(step, u, -torch.exp(w["A_log"]), b, c)
    return ((y + w["D"] * u) * _silu(gate)) @ w["out_proj.weight"].T
