"""Where rows come from: parquet, JSONL and text files, or a dataset of the hub, with a cursor to go on from."""
