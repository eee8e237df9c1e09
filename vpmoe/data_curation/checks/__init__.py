"""Is a dataset what its manifest says, and how do two of them differ."""
