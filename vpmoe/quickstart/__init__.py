"""``vpmoe quickstart``: from an empty checkout to a trained, evaluated nano vpMoE, by the commands a user would type.

``settings`` reads the numbers, ``plan`` says which command makes what, ``run`` gives the commands one after the other
(each finds by itself what of it is done), ``report`` holds the result against the targets.
"""
