"""Attention: projections (grouped-query or tensor-product), positions, sink, value residual, masks and the KV cache.

`self_attention` puts the parts together for one layer; `backends` holds the one function that all of them end in,
softmax attention with window, packed documents, distance bias and sink, and its implementations.
"""
