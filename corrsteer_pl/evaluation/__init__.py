"""Paired comparison of the unsteered and the changed model, and its reports."""
