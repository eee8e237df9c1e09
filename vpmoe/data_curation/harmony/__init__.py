"""SYNTH rows become conversations in parquet shards, with a manifest that says what they are made of."""
