"""From a built dataset to micro-batches: the reader, the packer, the global order and its cursor, the one batch type.

The way of a conversation: ``KDDataset[i]`` -> ``packing`` (which share a row) -> ``SampleOrder`` (which row of a
dataset comes when) -> ``Blend`` (which dataset's turn it is) -> ``sources`` (which rank gets it) -> ``Batch``. The
cursor is one integer, ``consumed_samples``. What a batch carries beside its core is declared (``annotations``).
"""
