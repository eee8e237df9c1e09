"""``vpmoe quickstart``: from an empty checkout to a trained, evaluated nano vpMoE, by the commands a user would type.

``settings`` reads the numbers, ``plan`` says which job makes what out of what, ``jobs`` decides which of them are done
and still valid, ``commands`` runs one command and passes signals on, ``report`` holds the result against the targets.
"""
