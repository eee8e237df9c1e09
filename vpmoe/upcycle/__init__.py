"""The ladder from Qwen3-0.6B to vpMoE and the stages that teach it: named objects, and the jobs that make them.

An object is a directory with a Megatron checkpoint, an HF directory and a receipt; a ladder's file (``ladder_file``)
declares it with its geometry, its inputs, its job and that job's settings. A job is a pure function from input objects
and settings to the weights of its output object (``job``); ``runner`` checks inputs, streams the weights to disk,
exports, verifies: one keyed step (``vpmoe.steps``) an object. A new job is one file and a line in ``jobs``.
"""
