"""Runs looked at: the registry that they stand in, their metrics asked in place, compared, drawn and exported.

Everything here only reads runs, at work or not; what a person adds (tags, a note) and removes goes to the registry.
"""
