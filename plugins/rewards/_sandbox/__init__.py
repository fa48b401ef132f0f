"""Run programs of completions in a sandbox."""
