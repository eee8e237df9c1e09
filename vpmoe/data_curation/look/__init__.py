"""Documents of a dataset for the eye: on the terminal and as a page."""
