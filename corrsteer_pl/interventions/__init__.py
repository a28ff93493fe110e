"""What is done to a model, as context managers that leave no trace."""
