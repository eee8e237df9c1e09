"""Decoding: one sampler with a key-value cache, greedy or by temperature and top-p."""

from megatron_vpmoe.runtime.device import prepare

prepare()
