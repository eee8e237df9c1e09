"""From rows to a dataset that training reads: SYNTH rows -> Harmony conversations -> token files with span sidecars.

``rows/`` reads them from files or the hub, ``conversations/`` turns them into Harmony, ``datasets/`` makes the token
files, ``checks/`` holds these against themselves, ``look/`` shows them, ``tasks/`` makes rows out of nothing for the
quickstart; ``harmony/`` keeps two older names of commands.
"""
