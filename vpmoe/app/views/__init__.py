"""A page a file, each with ``show``; it is imported when it is first opened."""
