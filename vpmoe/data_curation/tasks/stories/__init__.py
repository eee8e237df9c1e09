"""Stories for small language models: a grammar of plots, a corpus and instructions of it, and what checks a story.

``stories.toml`` holds what is told, and ``content`` says how; ``plots`` numbers every plot and ``telling`` words one;
``corpus`` writes stories, ``prompts`` and ``instructions`` ask for stories under constraints, and ``checker`` holds any
text to these. ``writing`` has a served model write them, over ``endpoint``.
"""
