"""The sampler: prompts of different lengths in one batch, a key-value cache, and a stop token.

Prompts are padded on the left; the padding is a document of its own, so no real token sees it and every prompt's
positions start at 0. Decoding therefore gives each prompt the tokens that it would get alone.

Shapes: B prompts, P longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.model.attention.kv_cache import KVCache
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.gpt import ModelOutput, VPModel
from megatron_vpmoe.model.tensor_parallel import whole_sequences
from megatron_vpmoe.runtime import stages


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose the next token.

    Attributes:
        max_new_tokens: tokens generated at most, the stop token included.
        stop_ids: tokens that end a sequence.
        temperature: 0 is greedy; otherwise the logits are divided by it.
        top_p: sample among the most likely tokens whose probabilities sum to at least this (nucleus sampling).
        seed: of the generator, for temperature > 0.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise DataError(
                f"unusable sampling options: {self}",
                remedy="temperature >= 0, 0 < top_p <= 1, max_new_tokens >= 1",
            )


@torch.no_grad()
def generate(model: VPModel, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> list[list[int]]:
    """Continue each prompt until a stop token or ``max_new_tokens``.

    Args:
        model: the bare model; what is generated lies on its device, and its training mode is restored afterwards. A
            collective of its tensor- and
            expert-parallel ranks: all pass the same prompts and get the same tokens.
        prompts: token ids, at least one a prompt.
        options: how to sample.

    Returns:
        the new tokens of each prompt, the stop token included where one was produced.
    """
    if any(not prompt for prompt in prompts) or not prompts:
        raise DataError("an empty prompt", source="the prompts to continue", remedy="give every prompt a token")
    was_training = model.training
    model.eval()
    try:
        with whole_sequences(model):
            return _decode(model, prompts, options)
    finally:
        model.train(was_training)


def _decode(model: VPModel, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> list[list[int]]:
    device = model.device
    tokens_BP, layout = left_padded(prompts, device)
    generator = torch.Generator(device=device).manual_seed(options.seed)
    stop = torch.tensor(options.stop_ids, device=device)
    cache = KVCache()
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    chosen: list[Tensor] = []
    tokens = tokens_BP
    for _ in range(options.max_new_tokens):
        output = _through_stages(model, tokens, layout, cache)
        if isinstance(output, ModelOutput):
            logits_BV = model.logits(output.hidden_BSH[:, -1]).float()
            next_B = choose(logits_BV, options, generator)
        else:
            next_B = torch.empty(len(prompts), dtype=torch.int64, device=device)
        stages.tell_stages(next_B)
        chosen.append(next_B)
        done_B |= torch.isin(next_B, stop)
        if bool(done_B.all()):
            break
        tokens, layout = next_B.unsqueeze(1), extended(layout)
    return [_until_stop(row, options.stop_ids) for row in torch.stack(chosen, dim=1).tolist()]


def _through_stages(model: VPModel, tokens: Tensor, layout: SequenceLayout, cache: KVCache) -> ModelOutput | Tensor:
    """This stage's part of a forward pass: what comes from the stage before, and what goes on to the next one."""
    if not model.stage.is_first:
        shape = (tokens.shape[1], tokens.shape[0], model.wire.width)
        received = torch.empty(shape, dtype=model.config.pipeline_dtype, device=tokens.device)
        stages.receive_from_previous_stage(received)
        model.set_input_tensor([received])
    output = model(tokens, layout, cache)
    if isinstance(output, Tensor):
        stages.send_to_next_stage(output)
    return output


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, SequenceLayout]:
    """Prompts as one batch, right-aligned: int64 [B, P] (padding 0) and its layout (padding is document -1)."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    document_id = torch.full((len(prompts), longest), -1, dtype=torch.int32)
    position = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt)
        tokens[row, start:] = torch.tensor(list(prompt))
        document_id[row, start:] = 0
        position[row, start:] = torch.arange(len(prompt))
    return tokens.to(device), SequenceLayout(document_id=document_id.to(device), position=position.to(device))


def extended(layout: SequenceLayout) -> SequenceLayout:
    """The layout with one more position in each row's last document."""
    return SequenceLayout(
        document_id=torch.cat([layout.document_id, layout.document_id[:, -1:]], dim=1),
        position=torch.cat([layout.position, layout.position[:, -1:] + 1], dim=1),
    )


def choose(logits_BV: Tensor, options: SamplingOptions, generator: torch.Generator) -> Tensor:
    """The next token of each row, int64 [B]: the most likely one, or a draw from the nucleus.

    Args:
        logits_BV: fp32.
        options: temperature and top_p.
        generator: on the device of the logits.
    """
    if options.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probs_BV = torch.softmax(logits_BV / options.temperature, dim=-1)
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
    # Keep a token while the mass before it is below top_p; the most likely one always stays.
    keep_BV = sorted_BV.cumsum(dim=-1) - sorted_BV < options.top_p
    drawn_B1 = torch.multinomial(sorted_BV * keep_BV, 1, generator=generator)
    return order_BV.gather(1, drawn_B1).squeeze(1)


def _until_stop(row: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    for index, token in enumerate(row):
        if token in stop_ids:
            return row[: index + 1]
    return row
