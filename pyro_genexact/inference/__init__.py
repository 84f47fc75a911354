"""Maximum likelihood, variational inference and automatic guides."""
