"""The sidecar of vpMoE: everything before training (tokenizer, Harmony, datasets) and everything after it.

Training never imports this package; files on disk and their manifests are the whole contract between the two.
"""
