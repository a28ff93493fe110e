"""Train SAEs on what a model thinks while it reads texts, or answers prompts: texts, activations, training, quality."""
