"""Estimate the peak memory of each phase before a model is loaded."""
