"""Training with `Trainer`: arguments, optimiser groups, recipes, checkpoints, metrics."""
