"""megatron.core's IndexedDatasetBuilder; the one import of megatron here, slow and therefore made only to write."""

import warnings

with warnings.catch_warnings():
    # Importing megatron.core says four times that TransformerEngine and Apex are absent; writing files needs neither.
    warnings.simplefilter("ignore", UserWarning)
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

__all__ = ["IndexedDatasetBuilder"]
