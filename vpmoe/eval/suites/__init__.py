"""Suites: fixed sets of texts and questions whose numbers compare over checkpoints, ladders and other people's models.

``bundle`` and ``fetch`` bring the tasks, ``prompts`` makes token ids of an item, ``likelihoods`` scores continuations,
``core8`` and ``text`` are the suites, ``suite_report`` what they leave behind.
"""
