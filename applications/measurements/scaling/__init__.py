"""What grows with tasks, parameters, inner steps, hyperparameters and ranks."""
