"""The whole ladder from one file: every object made or found done, evaluated in one way at every rung, and reported.

Models of different vocabularies are compared by bits per byte of held-out texts and by the share of held-out questions
that they answer right.
"""
