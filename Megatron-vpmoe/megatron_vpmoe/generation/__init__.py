"""Decoding: one engine for samples, evaluation, chat and reinforcement learning.

``engine`` shares prompts out, keeps the rows full and hands back completions; ``decoder`` is one token through
the training model's own weights; ``kv_cache`` holds the past; ``sampling`` chooses tokens; ``grammar`` says which may.
"""

from megatron_vpmoe.runtime.device import prepare

prepare()
