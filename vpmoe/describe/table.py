"""The layer table for people (rich) and for machines (a dictionary)."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vpmoe.config import (
    LayerGeometry,
    RunConfig,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    layer_geometries,
    parameter_count,
    training_flops_per_token,
)
from megatron_vpmoe.config.combinations import idle_fields, idle_lines
from megatron_vpmoe.config.geometry import output_layer_flops
from vpmoe.describe.layers import POSITION_NAMES, attention_words, feed_forward_words, fold, kind_words, numbers_of

_NUMBERS = ("parameters", "active", "KV B/token", "MFLOP/token")


def cache_bytes(cfg: RunConfig, seq_length: int) -> int:
    """Bytes of keys and values that stay after ``seq_length`` tokens: of local layers the last W - 1."""
    return sum(layer.cache_bytes * layer.cached_tokens(seq_length) for layer in layer_geometries(cfg))


def print_description(cfg: RunConfig, name: str, console: Console, *, every_layer: bool = False) -> None:
    """Print the layer table, the totals, what attention costs at other lengths, and the idle fields.

    Args:
        cfg: the configuration.
        name: its file, for the title.
        console: where to.
        every_layer: one row a layer instead of folding repetitions.
    """
    length = cfg.data.seq_length
    table = Table(title=f"{name}: {cfg.model.num_layers} layers, hidden {cfg.model.hidden_size}", title_justify="left")
    table.box = box.SIMPLE_HEAD
    for column in ("layers", "x", "kind", "attention", "positions", "feed-forward"):
        table.add_column(column, justify="right" if column == "x" else "left")
    for column in _NUMBERS:
        table.add_column(column, justify="right", no_wrap=True)
    for layer_numbers, times, layer in _rows(layer_geometries(cfg), every_layer):
        style = "bold" if layer.is_global else None
        table.add_row(layer_numbers, times, *_words(cfg, layer), *_figures(layer, length), style=style)
    console.print(table)
    console.print(Text("\n".join(_totals(cfg))))
    for line in idle_lines(cfg):
        console.print(Text(f"idle           {line}", style="dim"))


def _rows(layers: list[LayerGeometry], every_layer: bool) -> list[tuple[str, str, LayerGeometry]]:
    if every_layer:
        return [(str(layer.number), "", layer) for layer in layers]
    return [
        (numbers_of(run, folded), str(run.count * folded.times), run.layer)
        for folded in fold(layers)
        for run in folded.runs
    ]


def _words(cfg: RunConfig, layer: LayerGeometry) -> tuple[str, ...]:
    return (
        kind_words(layer), attention_words(cfg, layer), POSITION_NAMES[layer.position], feed_forward_words(cfg, layer)
    )  # fmt: skip


def _figures(layer: LayerGeometry, seq_length: int) -> tuple[str, ...]:
    return (
        f"{layer.parameters:,}",
        f"{layer.active_parameters:,}",
        f"{layer.cache_bytes:,}",
        f"{layer.flops(seq_length) / 1e6:,.2f}",
    )


def _totals(cfg: RunConfig) -> list[str]:
    count, length = parameter_count(cfg), cfg.data.seq_length
    layers = layer_geometries(cfg)
    tied = "" if cfg.model.untie_embeddings_and_output_weights else ", which is the output layer too"
    per_token = kv_cache_bytes_per_token(cfg)
    precision = "bf16" if cfg.training.bf16 else "fp32"
    forward = forward_flops_per_token(cfg) / 1e6
    attention = sum(layer.attention_flops(length) for layer in layers) / 1e6
    windows = {layer.window for layer in layers if layer.window is not None}
    whole = [layer for layer in layers if layer.is_global]
    lines = [
        f"embedding      {count.parts['embedding']:,} parameters{tied}; output layer {count.parts['output layer']:,}, "
        f"{output_layer_flops(cfg) / 1e6:,.2f} MFLOP/token; final norm {cfg.model.hidden_size:,}",
        f"parameters     {count.total:,} in all, {count.active:,} active, "
        f"{count.active_without_embeddings:,} active without embedding and output layer",
        f"KV cache       {per_token:,} B a token ({precision}), {cache_bytes(cfg, length) / 2**20:,.2f} MiB after "
        f"{length:,} tokens" + (f": local layers keep the last {min(windows) - 1}" if windows else ""),
        f"FLOPs          {forward:,.2f} M a token forward at {length:,} tokens, of which {attention:,.2f} M are scores "
        f"and weighted values; {training_flops_per_token(cfg) / 1e9:,.3f} G to train on one",
    ]
    if whole:
        each = whole[0].flops_per_key / 2e6
        lines.append(f"  with length  a global layer's attention costs (S + 1) x {each:g} M: {len(whole)} grow with S")
    if windows:
        local = next(layer for layer in layers if not layer.is_global)
        cost = local.flops_per_key * (local.window or 0) / 1e6
        lines.append(f"               a local layer's stays below W x {local.flops_per_key / 1e6:g} M = {cost:g} M")
    return lines


def description(cfg: RunConfig) -> dict[str, Any]:
    """Everything that the table says, one entry a layer; FLOPs at ``data.seq_length``. Ready for JSON."""
    count, length = parameter_count(cfg), cfg.data.seq_length
    return {
        "run_name": cfg.training.run_name,
        "seq_length": length,
        "precision": "bf16" if cfg.training.bf16 else "fp32",
        "layers": [_layer(cfg, layer, length) for layer in layer_geometries(cfg)],
        "parts": count.parts,
        "output_layer_flops_per_token": output_layer_flops(cfg),
        "totals": {
            "parameters": count.total,
            "active_parameters": count.active,
            "active_parameters_without_embeddings": count.active_without_embeddings,
            "kv_bytes_per_token": kv_cache_bytes_per_token(cfg),
            "kv_bytes_at_seq_length": cache_bytes(cfg, length),
            "forward_flops_per_token": forward_flops_per_token(cfg),
            "training_flops_per_token": training_flops_per_token(cfg),
        },
        "idle_fields": idle_fields(cfg),
    }


def _layer(cfg: RunConfig, layer: LayerGeometry, seq_length: int) -> dict[str, Any]:
    return {
        "layer": layer.number,
        "kind": "global" if layer.is_global else "local",
        "window": layer.window,
        "attention": "TPA" if layer.tensor_product else "GQA",
        "positions": layer.position,
        "feed_forward": "moe" if layer.sparse else "dense",
        "description": feed_forward_words(cfg, layer),
        "parameters": layer.parameters,
        "active_parameters": layer.active_parameters,
        "kv_bytes_per_token": layer.cache_bytes,
        "kv_tokens_kept": layer.cached_tokens(seq_length),
        "flops_per_token": layer.flops(seq_length),
        "attention_flops_per_token": layer.attention_flops(seq_length),
    }
