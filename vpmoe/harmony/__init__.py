"""Harmony, the format of a conversation as tokens: render it, cut it to length, label its spans, parse it back.

``renderer.render`` gives a conversation's token pieces message by message, ``truncation.fit`` cuts them to a length
without breaking structure, ``spans`` says which token is supervised and as what, and ``parse`` goes from ids back to
messages and judges what a model generated. ``official`` is the same renderer on top of ``openai_harmony``.
"""
