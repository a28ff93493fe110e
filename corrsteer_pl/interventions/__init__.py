"""Changes to a model, as context managers that undo them."""
