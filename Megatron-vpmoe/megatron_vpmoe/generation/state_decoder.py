"""Decoding of models whose layers keep a state of their own: one token of each row through the layers' own steps.

Rows begin, grow and end independently, as in `kv_cache`; what a layer keeps of one is told by its ``entries``. A
mixture is one layer, numbered 0, of whose parts each keeps something: keys and values, latents, sums, recurrent states.

Shapes: R rows, B rows in use, C columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from megatron_vpmoe.generation.decoder import Decoder
from megatron_vpmoe.generation.kv_cache import BLOCK
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.think.decoding import Entry, Past, empty
from megatron_vpmoe.think.mixture_model import MixtureModel

State = Mapping[tuple[int, str], Tensor]
"""By layer and name of the entry; of one row, or of many."""


class RowStates:
    """The state of rows, which goes on in place.

    Args:
        entries: what is kept of a row.
        stored: [R, *shape] of each entry; of a growing one [R, C, *shape].
    """

    def __init__(self, entries: Mapping[tuple[int, str], Entry], stored: dict[tuple[int, str], Tensor]) -> None:
        self._grows = {key for key, entry in entries.items() if entry.grows}
        self._stored = stored

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(stored.nbytes for stored in self._stored.values())

    def reserve(self, positions: int) -> None:
        """Make room for positions 0 to ``positions - 1`` of every row."""
        for key in self._grows:
            stored = self._stored[key]
            if positions > stored.shape[1]:
                columns = -(-positions // BLOCK) * BLOCK
                grown = stored.new_zeros(len(stored), columns, *stored.shape[2:])
                grown[:, : stored.shape[1]] = stored
                self._stored[key] = grown

    def fill(self, row: int, past: State) -> None:
        """Begin a row with what its first tokens have left."""
        for key, value in past.items():
            stored = self._stored[key][row]
            (stored[: len(value)] if key in self._grows else stored).copy_(value)

    def move(self, source: int, target: int) -> None:
        """Let row ``target`` go on as row ``source`` has come so far."""
        for stored in self._stored.values():
            stored[target] = stored[source]

    def begin(self, position_B: Tensor) -> None:
        """Rows at position 0 start from nothing, whatever another one has left in their place."""
        for key in self._stored.keys() - self._grows:
            stored = self._stored[key][: position_B.shape[0]]
            stored.masked_fill_((position_B == 0).view(-1, *[1] * (stored.dim() - 1)), 0)

    def of_layer(self, number: int, rows: int) -> dict[str, Tensor]:
        """The entries of a layer in the first ``rows`` rows, to be read and written."""
        return {name: stored[:rows] for (layer, name), stored in self._stored.items() if layer == number}


class StateDecoder:
    """As `decoder.Decoder`, of a model of state space layers on one process.

    Args:
        model: in evaluation mode; its weights must not change while this lives.

    Attributes:
        entries: what is kept of a row, by layer and name.
    """

    def __init__(self, model: VPModel) -> None:
        self._model = model
        self.entries: dict[tuple[int, str], Entry] = {
            (number, name): entry for number, layer in self._layers() for name, entry in layer.entries().items()
        }

    def _layers(self) -> Iterable[tuple[int, Any]]:
        return ((layer.layer_number, layer) for layer in cast(Any, self._model.decoder).layers)

    def cache(self, rows: int) -> RowStates:
        """Empty states of so many rows."""
        return RowStates(self.entries, empty(self.entries, rows, 0, self._model.device))

    def pasts(self, token_1S: Tensor, layout: SequenceLayout, spans: Sequence[slice]) -> list[State]:
        """Of the documents of a packed row, each in its columns, what they leave, by the model's own forward pass."""
        computed: dict[int, Any] = {}
        self._model(token_1S, layout, computed)
        number_of = {span.start: number for number, span in enumerate(Past.of(layout).spans)}
        return [
            {
                (layer, name): value[span if self.entries[layer, name].grows else number_of[span.start]]
                for layer, values in computed.items()
                for name, value in values.items()
            }
            for span in spans
        ]

    def step(self, token_B: Tensor, position_B: Tensor, cache: RowStates, longest: int) -> Tensor:
        """As ``Decoder.step``: fp32 logits [B, V]. A state has no columns, so nothing follows from ``longest``."""
        cache.begin(position_B)
        hidden_BH = self._model.embedding(input_ids=token_B[None], position_ids=None)[:, 0]
        for number, layer in self._layers():
            hidden_BH = layer.step(hidden_BH, cache.of_layer(number, token_B.shape[0]))
        return self._model.logits(cast(Any, self._model.decoder).final_layernorm(hidden_BH)).float()


class MixtureDecoder(StateDecoder):
    """As `StateDecoder`, of a mixture."""

    _model: MixtureModel

    def __init__(self, model: MixtureModel) -> None:
        super().__init__(model)
        self._scale = model.scale()

    def _layers(self) -> Iterable[tuple[int, Any]]:
        return [(0, self._model)]

    def step(self, token_B: Tensor, position_B: Tensor, cache: RowStates, longest: int) -> Tensor:
        """As ``Decoder.step``; columns are those that were reserved."""
        cache.begin(position_B)
        hidden_BH, _ = self._model.step(token_B, position_B, cache.of_layer(0, token_B.shape[0]), self._scale)
        return self._model.logits(hidden_BH).float()


def decoder_of(model: VPModel, *, packed: bool) -> Decoder | StateDecoder:
    """What decodes a model; ``packed`` as for ``Decoder``.

    Raises:
        ConfigError: it is a denoiser.
    """
    config = cast(VPTransformerConfig, model.config)
    if config.layer_type == "denoiser":
        model.output_weight()  # says that there is none
    if isinstance(model, MixtureModel):
        return MixtureDecoder(model)
    return StateDecoder(model) if config.layer_type == "state_space" else Decoder(model, packed=packed)
