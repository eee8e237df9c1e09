"""Two commands by the names that users of the design know; what they do is in ``conversations/``."""
