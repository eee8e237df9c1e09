"""Models that say something of documents: ahead of time, in sidecars that training reads instead of a second model; or,
served, while a training runs.
"""
