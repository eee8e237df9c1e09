"""A store of vectors that can be asked for the nearest ones, and what is asked of it chunk by chunk.

It stands on this side because an index is data on a disk behind a library of its own (FAISS, the extra ``retrieval``):
a model reads what was found as arrays (``megatron_vpmoe.think.memory``), and trains and runs where no FAISS is.
"""
