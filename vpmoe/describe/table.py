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
from megatron_vpmoe.config.geometry import output_layer_flops
from megatron_vpmoe.config.rules import idle_fields, idle_lines
from vpmoe.describe.layers import (
    POSITION_NAMES,
    amount,
    attention_words,
    feed_forward_words,
    kind_words,
    kinds,
    legend,
    numbers_of,
)

_WIDE = 100  # columns of a terminal that hold a row with every digit


def cache_bytes(cfg: RunConfig, seq_length: int) -> int:
    """Bytes of keys and values that stay after ``seq_length`` tokens: of local layers the last W - 1."""
    return sum(layer.cache_bytes * layer.cached_tokens(seq_length) for layer in layer_geometries(cfg))


def print_description(cfg: RunConfig, name: str, console: Console, *, every_layer: bool = False) -> None:
    """Print the layer table, the totals, what attention costs at other lengths, and the idle fields.

    Args:
        cfg: the configuration.
        name: its file, for the title.
        console: where to.
        every_layer: one row a layer instead of one a kind.

    A narrow terminal gets the parameters of a layer to three digits, as 70.9 M.
    """
    length, layers = cfg.data.seq_length, layer_geometries(cfg)
    title = f"{name}: {len(layers)} layers, hidden {cfg.model.hidden_size}"
    exact = console.width >= _WIDE
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 1, 0, 0) if exact else 0
    table.add_column("layers")
    table.add_column("x", justify="right", no_wrap=True)
    for column in ("kind", "attn", "position", "ffn"):
        table.add_column(column, no_wrap=True)
    for column in ("params", "active", "KV B", "MFLOP"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer_numbers, times, layer in _rows(layers, every_layer):
        style = "bold" if layer.is_global else None
        table.add_row(layer_numbers, times, *_words(cfg, layer), *_figures(layer, length, exact), style=style)
    console.print(table)
    notes = Table.grid("", "", padding=(0, 2, 0, 0))
    per_token = ("KV B, MFLOP", "bytes of cache and forward FLOPs of one token in one layer")
    for word, meaning in [per_token, *legend(cfg, layers), *_totals(cfg)]:
        notes.add_row(word, Text(meaning))
    for line in idle_lines(cfg):
        notes.add_row("idle", Text(line), style="dim")
    console.print(notes)


def _rows(layers: list[LayerGeometry], every_layer: bool) -> list[tuple[str, str, LayerGeometry]]:
    if every_layer:
        return [(str(layer.number), "", layer) for layer in layers]
    return [(numbers_of(members), str(len(members)), members[0]) for members in kinds(layers)]


def _words(cfg: RunConfig, layer: LayerGeometry) -> tuple[str, ...]:
    return (
        kind_words(layer), attention_words(cfg, layer), POSITION_NAMES[layer.position], feed_forward_words(cfg, layer)
    )  # fmt: skip


def _figures(layer: LayerGeometry, seq_length: int, exact: bool) -> tuple[str, ...]:
    write = (lambda count: f"{count:,}") if exact else amount
    return (
        write(layer.parameters),
        write(layer.active_parameters),
        f"{layer.cache_bytes:,}",
        f"{layer.flops(seq_length) / 1e6:,.2f}",
    )


def _totals(cfg: RunConfig) -> list[tuple[str, str]]:
    count, length, layers = parameter_count(cfg), cfg.data.seq_length, layer_geometries(cfg)
    tied, is_denoiser = not cfg.model.untie_embeddings_and_output_weights, cfg.model.layer_type == "denoiser"
    output = "is the same matrix" if tied else f"{count.parts['output layer']:,}"
    vocabulary = f"{count.parts['embedding']:,} parameters" + (
        "" if is_denoiser else f", and the output layer {output}"
    )
    cache = f"{kv_cache_bytes_per_token(cfg):,} B a token ({'bf16' if cfg.training.bf16 else 'fp32'}), "
    cache += f"{cache_bytes(cfg, length) / 2**20:,.2f} MiB after {length:,} tokens"
    local = [layer for layer in layers if layer.window is not None]
    if local:
        cache += f": local layers keep the last {(local[0].window or 0) - 1}"
    attention = sum(layer.attention_flops(length) for layer in layers) / 1e6
    flops = f"{forward_flops_per_token(cfg) / 1e6:,.2f} M a token forward at {length:,} tokens: "
    flops += f"{attention:,.2f} M of scores and weighted values, {output_layer_flops(cfg) / 1e6:,.2f} M of the "
    flops += (
        f"{'estimate' if is_denoiser else 'output layer'}; {training_flops_per_token(cfg) / 1e9:,.3f} G to train on one"
    )
    parameters = f"{count.total:,} in all, {count.active:,} active, {count.active_without_embeddings:,} active "
    parameters += "without embedding and output layer"
    lines = [("embedding", vocabulary), ("parameters", parameters), ("KV cache", cache), ("FLOPs", flops)]
    if cfg.model.layer_type == "state_space":
        return [line for line in lines if line[0] != "KV cache"]
    if cfg.model.layer_type in ("denoiser", "mixture"):
        return lines
    each = layers[0].flops_per_key
    if len(local) < len(layers):
        cost = f"(S + 1) / 2 x {each:,} in a document of S tokens, on average"
        lines.append(("  global", f"scores and weighted values of each of {len(layers) - len(local)} layers: {cost}"))
    if local:
        cost = f"below W x {each:,} = {each * (local[0].window or 0):,}, however long S is"
        lines.append(("  local", f"of each of {len(local)} layers: {cost}"))
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
        "part": layer.part or None,
        "kind": "state_space" if layer.state_size is not None else "global" if layer.is_global else "local",
        "window": layer.window,
        "attention": None if layer.state_size is not None else "TPA" if layer.tensor_product else "GQA",
        "positions": layer.position,
        "feed_forward": None if layer.state_size is not None else "moe" if layer.sparse else "dense",
        "state_size": layer.state_size,
        "parameters": layer.parameters,
        "active_parameters": layer.active_parameters,
        "kv_bytes_per_token": layer.cache_bytes,
        "kv_tokens_kept": layer.cached_tokens(seq_length),
        "flops_per_token": layer.flops(seq_length),
        "attention_flops_per_token": layer.attention_flops(seq_length),
    }
