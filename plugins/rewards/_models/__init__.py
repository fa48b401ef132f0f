"""Loading of reward models and reading of their scores."""
