"""Stories for small language models: a grammar of plots, a corpus and instructions of it, and what checks a story.

``words`` and the two files of ``scenes`` hold what is told; ``plots`` numbers every plot and ``telling`` words one;
``corpus`` writes stories, ``prompts`` asks for stories under constraints, and ``checker`` holds any text to these.
"""
