"""Sandboxes for programs in completions."""
