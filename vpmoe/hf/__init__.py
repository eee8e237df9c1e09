"""HF's side of the models: directories that ``AutoModelForCausalLM`` loads, and the way to and from Megatron's names.

``qwen3`` maps the geometry and weights of HF's Qwen3 to ours and back, ``student`` those of every other rung, whose HF
model is in the files ``*_vpmoe.py`` that an export carries along; ``convert`` imports a directory into a Megatron
checkpoint and exports a checkpoint into a directory; ``parity`` holds the two sides against each other.
"""
