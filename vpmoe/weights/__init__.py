"""Weights on disk as streams: named tensors that are read when asked for and written one by one.

``tensors`` says what a model's weights are to everybody else: a mapping from names to tensors not read yet.
``safetensors_folder`` reads and writes HF directories, ``megatron_checkpoint`` Megatron's distributed format. Whoever
converts weights maps one mapping to another; memory holds what a single output tensor needs.
"""

from vpmoe.weights.tensors import LazyTensor, Weights, check_geometry, weights_sha256

__all__ = ["LazyTensor", "Weights", "check_geometry", "weights_sha256"]
