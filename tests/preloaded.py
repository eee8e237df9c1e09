"""What processes of tests are forked with (tests/workers.py): it is imported once instead of in each of them."""

import gc

import pytest  # noqa: F401  which modules of targets import
import torch._dynamo  # noqa: F401  which torch imports as the first optimizer is made

import megatron_vpmoe.optim
import megatron_vpmoe.planning.here
import megatron_vpmoe.pretrain
import megatron_vpmoe.training.loop  # noqa: F401
from megatron_vpmoe.runtime.device import prepare

prepare()
gc.freeze()
