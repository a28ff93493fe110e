"""What a run leaves, where it came from, and how it is read again."""
