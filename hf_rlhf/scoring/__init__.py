"""Scoring of completions, with or without a policy."""
