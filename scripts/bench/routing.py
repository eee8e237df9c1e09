"""What sampler and trainer make of the same answers, with and without routing replay; counts, not times.

A model answers prompts, and the trainer's forward pass computes the answers again, packed, with the same weights: once
routed by itself, once where the sampler's tokens went. Told are |log p - log p sampled| of the answers' tokens, mean
and largest, the share whose importance weight a clamp at 2 would hold, and the share of all tokens, prompts' included,
whose experts differ: in a layer on average, and in any layer.

    python scripts/bench/routing.py --scales 1 3

The model is configs/nano/stage1.yaml, untrained, in fp32 and in bf16; --scales multiplies its matrices: the larger, the
further from uniform are its answers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megatron_vpmoe.config import load_config
from megatron_vpmoe.data.batch import Batch, assemble
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.prompts import Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.replay import ROUTING, recording, replaying
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.sources.groups import Rollout, annotations_of, packed
from megatron_vpmoe.sources.reference import log_p_of_labels

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "stage1.yaml"
SAMPLED = '--objective grpo --eval-interval null --rewards [{"function":"finished"}] --router-replay replay'


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer; prompts have 8 to 64")
    return parser.parse_args()


def answered(model: VPModel, args: argparse.Namespace, vocabulary: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 65, (args.prompts,), generator=generator).tolist()
    prompts = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    options = SamplingOptions(args.tokens, (), temperature=1.0, samples=args.samples)
    completions = generate(model, [Prompt(ids) for ids in prompts], options, record_routing=True)
    return [Rollout.of(one, prompts[one.place], one.place) for one in completions]


def mismatch(model: VPModel, batch: Batch, *, replay: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of answers' tokens log p - log p sampled; of all tokens but documents' last whether experts differ, [n, L]."""
    sampled, routing = batch.annotations["sampled_log_p"], batch.annotations[ROUTING]
    with replaying(model, routing if replay else None, batch.document_id), recording(model) as take:
        log_p = log_p_of_labels(model, batch)
        assert take is not None
        chosen = take().unflatten(0, (batch.tokens.shape[1], -1)).transpose(0, 1)
    known = torch.zeros_like(batch.loss_mask)
    known[:, :-1] = (batch.document_id[:, 1:] == batch.document_id[:, :-1]) & (batch.document_id[:, 1:] >= 0)
    topk = model.config.moe_router_topk
    sets = [x[known].unflatten(1, (-1, topk)).sort(-1).values for x in (chosen, routing)]
    return (log_p - sampled)[batch.loss_mask], (sets[0] != sets[1]).any(-1)


def measure(args: argparse.Namespace, scale: float, bf16: bool) -> None:
    cfg = load_config(CONFIG, [*SAMPLED.split(), "--bf16" if bf16 else "--no-bf16"])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter *= scale
    rollouts = answered(model, args, cfg.model.padded_vocab_size)
    rows = packed([len(one) for one in rollouts], cfg.data.seq_length)
    batches = [
        assemble(
            [[rollouts[place].document() for place in row]],
            seq_length=cfg.data.seq_length,
            eod_id=0,
            sample_ids=[0],
            annotations=annotations_of(cfg),
        )
        for row in rows
    ]
    for replay in (False, True):
        found = [mismatch(model, batch, replay=replay) for batch in batches]
        difference, differ = (torch.cat(part) for part in zip(*found, strict=True))
        clamped, layer, any_layer = (x.double().mean() for x in (difference.exp() > 2, differ, differ.any(-1)))
        print(
            f"{'bf16' if bf16 else 'fp32'}, matrices times {scale:g}, {'replay' if replay else 'off':6}: "
            f"gap {difference.abs().mean():.2e}, at most {difference.abs().max():.2e}, clamped {clamped:.2%}; "
            f"experts differ in a layer {layer:.2%}, in any {any_layer:.2%} ({len(difference)} answer tokens)",
            flush=True,
        )


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    with distributed.single_process(seed=1):
        for scale in args.scales:
            for bf16 in (False, True):
                measure(args, scale, bf16)


if __name__ == "__main__":
    main()
