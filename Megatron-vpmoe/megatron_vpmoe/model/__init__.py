"""The student: Megatron-Core's modules plus ours, declared in layer_specs, assembled in gpt, built by builder."""

from megatron_vpmoe.runtime.device import prepare

prepare()
