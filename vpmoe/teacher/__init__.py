"""Models that say something of a dataset's documents ahead of time: sidecars that training reads instead of a second
model.
"""
