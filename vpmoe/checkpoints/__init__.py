"""Checkpoints as files: what one holds and where it comes from, whether it is sound, how two differ.

Runs, single checkpoints, objects of a ladder and HF directories; on the CPU of one process, tensor by tensor, and
nothing is written.
"""
