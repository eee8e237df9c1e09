"""From rows to a dataset that training reads: SYNTH rows -> Harmony conversations -> token files with span sidecars.

``harmony/`` converts rows and writes the input manifest, ``build`` makes the Megatron files, ``verify`` re-checks them,
``inspect`` shows them, ``synth_mini`` makes rows out of nothing for the quickstart.
"""
