"""Read recipes and overrides and resolve them to an Algorithm, which refuses what cannot run."""
