"""One file per command that is not a stage of the Trainer."""
