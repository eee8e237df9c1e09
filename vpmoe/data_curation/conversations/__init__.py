"""Rows become Harmony conversations, kept in parquet shards with a manifest."""
