"""The ladder from Qwen3-0.6B to vpMoE: named objects, and the jobs that make one from another.

An object is a directory with a Megatron checkpoint, an HF directory and a receipt (``registry``, ``receipt``); it is
declared in ``configs/upcycle/objects.toml`` with its geometry and inputs. A job is a pure function from input objects
and settings (one TOML an object) to the weights of its output object (``job``); ``runner`` checks inputs, streams the
weights to disk, exports, verifies, and gives the directory its name when everything is there. A new job is one file and
a line in ``jobs``.
"""
