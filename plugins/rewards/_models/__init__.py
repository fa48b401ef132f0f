"""Load reward models and read their scores."""
