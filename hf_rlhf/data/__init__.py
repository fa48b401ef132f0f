"""Datasets, the stream of prompts, and model loading."""
