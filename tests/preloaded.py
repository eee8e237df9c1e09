"""What processes of tests are forked with (tests/workers.py): it is imported once instead of in each of them."""

import gc

import megatron_vpmoe.optim
import megatron_vpmoe.training.loop  # noqa: F401
from megatron_vpmoe.runtime.device import prepare

prepare()
gc.freeze()
