"""Training: maximum likelihood, variational inference and automatic guides."""
