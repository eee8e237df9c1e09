"""What a trained model can do: losses on held-out rows, answers to held-out questions, and pictures of a run.

``checkpoints`` opens a run for inference, ``nano`` evaluates one on questions whose answers can be checked, ``scoring``
judges what was generated, ``reports`` and ``plots`` write what came out, ``display`` shows a conversation to a person.
"""
