"""``vpmoe train CONFIG [--field-name value ...]``: check a run, then start and watch its worker processes.

Everything that can go wrong through the user's doing is found here, before any process starts; exit code 2, no
traceback unless ``--debug``.
"""
