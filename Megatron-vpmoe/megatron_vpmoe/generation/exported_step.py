"""One decoding step as a program of torch.export: written to a file, and read back without the model's code.

The program takes token ids, their positions and the state of each row, and returns logits and the state behind the
token. It changes nothing that it is given, and takes any number of rows and columns.

Shapes: B rows, C columns, V vocabulary.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import Module

from megatron_vpmoe.errors import CheckpointError, ConfigError, DeviceError
from megatron_vpmoe.files import write_atomically
from megatron_vpmoe.generation.state_decoder import RowStates, StateDecoder, decoder_of
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.think.decoding import Entry, empty
from megatron_vpmoe.think.mixture_model import MixtureModel

_TOLD = "step.json"
"""What the file holds beside the program: entries of the state, vocabulary, and which model it is."""

MARK = f"extra/{_TOLD}"
"""Stands in every such file, by its name there."""

_MOST = 1 << 20
"""Rows and columns, of which torch wants a bound."""

State = dict[str, Tensor]
"""Entries by name, [B, *shape]; growing ones [B, C, *shape]."""


@dataclass(frozen=True)
class ExportedStep:
    """A step that was read.

    Attributes:
        entries: of a row's state, by name.
        vocab_size: V.
        model: which model it is of, as whoever wrote it says.
        program: from int64 token ids [B], int64 positions [B] in their texts and a state to fp32 logits [B, V] and the
            state that follows. C is above every position. A row at position 0 starts from nothing.
    """

    entries: Mapping[str, Entry]
    vocab_size: int
    model: Mapping[str, Any]
    program: Callable[[Tensor, Tensor, State], tuple[Tensor, State]]

    @classmethod
    def read(cls, path: Path) -> ExportedStep:
        """Of a file of ``export_step``.

        Raises:
            CheckpointError: it is none, or damaged.
        """
        extra: dict[str, Any] = {_TOLD: ""}
        try:
            exported = torch.export.load(path, extra_files=extra)
            told = json.loads(extra[_TOLD])
            entries = {name: _entry(one) for name, one in told["entries"].items()}
        except FileNotFoundError:
            raise
        except Exception as error:
            remedy = "write it again: vpmoe checkpoint export-step"
            raise CheckpointError(f"no step that was exported: {error}", source=str(path), remedy=remedy) from error
        return cls(entries, told["vocab_size"], told["model"], cast(Any, exported.module()))

    def state(self, rows: int, columns: int) -> State:
        """Of rows that are to begin, for texts of up to so many tokens."""
        return empty(self.entries, rows, columns, torch.device("cpu"))


@torch.no_grad()
def export_step(model: VPModel, path: Path, described: Mapping[str, Any]) -> Mapping[str, Entry]:
    """Write a model's decoding step.

    Args:
        model: in evaluation mode, on a CPU; its weights go into the file.
        path: of the file; replaced.
        described: which model it is, for JSON.

    Returns:
        entries of a row's state, by name.

    Raises:
        ConfigError: a model without such a step: a denoiser, a transformer's stack, a mixture with a store.
        DeviceError: it is not on a CPU.
    """
    if model.device.type != "cpu":
        source, remedy = f"a model on {model.device}", "hide the GPU from the process: CUDA_VISIBLE_DEVICES="
        raise DeviceError("a step is exported on a CPU alone", source=source, remedy=remedy)
    decoder = decoder_of(model, packed=False)
    if not isinstance(decoder, StateDecoder):
        raise ConfigError(
            "a transformer's decoder keeps its cache in place, and by operators of torch's own that no program holds",
            source="model.layer_type: transformer",
            remedy="export a step of a mixture or of a state space model; vpmoe hf export writes a transformer",
        )
    if isinstance(model, MixtureModel) and model.recall is not None:
        raise ConfigError(
            "a mixture with a store asks it in the middle of a step, which no program can",
            source=f"data.store: {model.recall.source}",
            remedy="export a step of a mixture that has none",
        )
    step = _Step(model, decoder)
    # Not 1 of anything, which a trace takes for a constant.
    state = empty(step.entries, 2, 3, model.device)
    given = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), state
    step(*given)  # tables that are made when they are first asked for are then constants of the trace
    rows, columns = Dim("rows", min=1, max=_MOST), Dim("columns", min=1, max=_MOST)
    of_state = {name: {0: rows, 1: columns} if one.grows else {0: rows} for name, one in step.entries.items()}
    exported = torch.export.export(step, given, dynamic_shapes=({0: rows}, {0: rows}, of_state), strict=False)
    entries = {name: {**asdict(one), "dtype": str(one.dtype)} for name, one in step.entries.items()}
    told = {"entries": entries, "vocab_size": model.vocab_size, "model": dict(described)}
    content = io.BytesIO()
    torch.export.save(exported, content, extra_files={_TOLD: json.dumps(told)})
    write_atomically(path, content.getvalue())
    return step.entries


class _Step(Module):
    """The step of a decoder, on copies of the state."""

    def __init__(self, model: VPModel, decoder: StateDecoder) -> None:
        super().__init__()
        self.model, self._decoder = model, decoder
        self._key_of = {f"{layer}.{name}": (layer, name) for layer, name in decoder.entries}
        self.entries = {name: decoder.entries[key] for name, key in self._key_of.items()}

    def forward(self, token_B: Tensor, position_B: Tensor, state: State) -> tuple[Tensor, State]:
        held = {self._key_of[name]: value.clone() for name, value in state.items()}
        logits_BV = self._decoder.step(token_B, position_B, RowStates(self._decoder.entries, held), 0)
        return logits_BV, {name: held[key] for name, key in self._key_of.items()}


def _entry(told: Mapping[str, Any]) -> Entry:
    dtype = getattr(torch, told["dtype"].removeprefix("torch."))
    return Entry(tuple(told["shape"]), dtype, told["grows"])
