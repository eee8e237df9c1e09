"""The sidecar of vpMoE: everything before training (tokenizer, Harmony, datasets) and everything after it.

Training never imports this package; files on disk and their manifests are the whole contract between the two. What
both stand on (errors, files, ownership, the software's versions) is ``megatron_vpmoe``'s and knows no model.
"""

__version__ = "0.1.0"
"""Of the code, in the key of every step: raise it with a release."""
