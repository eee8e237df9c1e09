"""Keyed steps: the one engine that knows what is done, still valid, due and why, and what may be replaced.

A step makes one folder. Its key is everything that decides what comes out. The work goes on in ``<folder>.partial``,
under a lock with an owner, and a step that was interrupted goes on from there as long as its key is the same; at the
end the folder gets its receipt (key, files with hashes, report) and takes its name in one rename. The receipt is the
proof that the folder is ours: nothing without one is ever removed, and finished work is replaced only when asked.
"""

from vpmoe.steps.receipt import RECEIPT, content_sha256, read_receipt
from vpmoe.steps.single import MARK, as_label, check_replaceable, plotting, save_figure, save_page, save_picture
from vpmoe.steps.step import State, Step, check_place
from vpmoe.steps.work import Say, Work, discard, run

__all__ = [
    "MARK",
    "RECEIPT",
    "Say",
    "State",
    "Step",
    "Work",
    "as_label",
    "check_place",
    "check_replaceable",
    "content_sha256",
    "discard",
    "plotting",
    "read_receipt",
    "run",
    "save_figure",
    "save_page",
    "save_picture",
]
