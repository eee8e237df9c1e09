"""What machines would make of a configuration: layouts, step time, memory and cost, to look at; and a CPU measured.

The model is ``megatron_vpmoe.planning``'s; here is what a person asks of it. See docs/performance.md.
"""
