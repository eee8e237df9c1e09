"""Where the time of a training step goes: a short run on mock data, its trace, and a summary small enough to keep."""

from megatron_vpmoe.runtime.device import prepare

prepare()
