"""What a Trainer runs: one LightningModule per method, and the evaluation that they share."""
