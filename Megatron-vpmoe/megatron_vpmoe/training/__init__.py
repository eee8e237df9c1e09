"""The one training loop, and what it calls between two steps: the step itself, evaluation, checkpoints, progress."""

from megatron_vpmoe.runtime.device import prepare

prepare()
