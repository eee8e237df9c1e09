"""What is generated: the task families of synth_mini, and stories.

``family`` says what a family is and how its questions are dealt to the splits; ``registry`` lists the families; every
other file holds the families of one kind: their questions, the derivation of each answer, and the wording in each
language. ``stories`` is a room of its own.
"""
