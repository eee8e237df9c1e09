"""What the launcher makes of a worker's stacks."""

from __future__ import annotations

import pytest

from megatron_vpmoe.launch.life import waits_for_others

WATCHING = """Thread 0x00007f00 (most recent call first):
  File "/python/threading.py", line 331 in wait
"""


@pytest.mark.parametrize(
    ("innermost", "expected"),
    [
        ("torch/distributed/distributed_c10d.py", True),
        ("megatron_vpmoe/training/step.py", True),  # a GPU that is in a collective: the host asks for the loss
        ("megatron_vpmoe/runtime/signals.py", True),
        ("megatron_vpmoe/data/kd_dataset.py", False),
        ("rewards/of_mine.py", False),
    ],
)
def test_who_waits_for_others_is_not_who_hangs(innermost: str, expected: bool) -> None:
    """Wherever it was called from."""
    frames = [f'  File "/site/{path}", line 9 in x' for path in (innermost, "torch/distributed/run.py")]
    stacks = f"{WATCHING}\nCurrent thread 0x00007f01 (most recent call first):\n" + "\n".join(frames) + "\n"
    assert waits_for_others(stacks) is expected
