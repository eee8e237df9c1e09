"""The app: runs, routing, models, data and reports in a browser. Pages only show; what they show is computed beside
them, in functions that need no browser, and read by the same code that the commands use."""
