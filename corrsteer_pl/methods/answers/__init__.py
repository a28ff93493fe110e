"""How samples are answered, by the unchanged model and by changed ones, and what comes of it."""
