"""Which layers a stage holds: every layer once, in order, as Megatron-Core divides them."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_vpmoe.config import load_config, parameter_count
from megatron_vpmoe.config.geometry import stage_layers
from megatron_vpmoe.model.transformer_config import transformer_config

FIRST, LAST = "--num-layers-in-first-pipeline-stage", "--num-layers-in-last-pipeline-stage"


@pytest.mark.parametrize(
    ("layers", "stages", "uneven", "counts"),
    [
        (4, 1, [], [4]),
        (4, 2, [], [2, 2]),
        (4, 2, [FIRST, "3"], [3, 1]),
        (4, 2, [LAST, "1"], [3, 1]),
        (80, 8, [], [10] * 8),
        (80, 4, [LAST, "17"], [21, 21, 21, 17]),
        (80, 4, [FIRST, "21", LAST, "17"], [21, 21, 21, 17]),
        (80, 3, [FIRST, "28", LAST, "24"], [28, 28, 24]),
        (10, 2, [FIRST, "6", LAST, "4"], [6, 4]),
    ],
)
def test_division(small: Path, layers: int, stages: int, uneven: list[str], counts: list[int]) -> None:
    flags = ["--num-layers", str(layers), "--pipeline-model-parallel-size", str(stages), "--nproc-per-node", "24"]
    cfg = load_config(small, [*flags, *uneven, "--router-dead-experts-warn", "null"])
    divided = stage_layers(cfg)
    assert [len(stage) for stage in divided] == counts
    assert [number for stage in divided for number in stage] == list(range(1, layers + 1))
    theirs = transformer_config(cfg)
    for index, stage in enumerate(divided):
        assert get_transformer_layer_offset(theirs, None, index) == stage.start - 1
        assert get_num_layers_to_build(theirs, pp_rank=index) == len(stage)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_the_stages_make_the_model(small: Path, tied: bool) -> None:
    flags = ["--pipeline-model-parallel-size", "2", *(["--no-untie-embeddings-and-output-weights"] if tied else [])]
    cfg = load_config(small, flags)
    parts = [parameter_count(cfg, layers) for layers in stage_layers(cfg)]
    copy = cfg.model.padded_vocab_size * cfg.model.hidden_size if tied else 0
    assert sum(part.total for part in parts) == parameter_count(cfg).total + copy
