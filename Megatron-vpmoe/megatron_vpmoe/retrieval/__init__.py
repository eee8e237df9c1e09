"""A store of vectors that can be asked for the nearest ones: FAISS, the extra ``retrieval``.

It knows no model: what asks it, and what a model reads of the answers, is ``megatron_vpmoe.think.recall``.
"""
