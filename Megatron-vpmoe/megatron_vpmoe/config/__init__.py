"""The configuration: what a run is, read from one YAML, checked as a whole before anything is allocated.

``schema`` declares the typed sections, ``load`` turns files and flags into a ``RunConfig`` or one complete error,
``rules`` holds what fields demand of each other, ``geometry`` and ``memory`` compute sizes from it, and ``provenance``
says which differences forbid resuming a run.
"""

from megatron_vpmoe.config.fit import FitReport, check_fit, fit_report
from megatron_vpmoe.config.geometry import (
    ParameterCount,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    parameter_count,
    training_flops_per_token,
)
from megatron_vpmoe.config.layer_geometry import LayerGeometry, layer_geometries
from megatron_vpmoe.config.load import check_world, load_config
from megatron_vpmoe.config.memory import MemoryEstimate, memory_estimate
from megatron_vpmoe.config.provenance import FieldChange, deciding_fields, geometry_diff, provenance_diff, stored_faults
from megatron_vpmoe.config.schema import RunConfig, config_hash

__all__ = [
    "FieldChange",
    "FitReport",
    "LayerGeometry",
    "MemoryEstimate",
    "ParameterCount",
    "RunConfig",
    "check_fit",
    "check_world",
    "config_hash",
    "deciding_fields",
    "fit_report",
    "forward_flops_per_token",
    "geometry_diff",
    "kv_cache_bytes_per_token",
    "layer_geometries",
    "load_config",
    "memory_estimate",
    "parameter_count",
    "provenance_diff",
    "stored_faults",
    "training_flops_per_token",
]
