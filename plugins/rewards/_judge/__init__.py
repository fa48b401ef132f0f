"""Prompts, replies, costs and cached answers of judges."""
