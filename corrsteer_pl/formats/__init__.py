"""Steering vectors in the files of other programs: written with a measured difference, and read."""
