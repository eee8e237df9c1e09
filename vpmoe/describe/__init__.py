"""What a configuration builds, to look at: the layer table, the same for machines, and a picture of the stack.

Every number comes from ``megatron_vpmoe.config`` by arithmetic; nothing is allocated and torch is not imported.
"""
