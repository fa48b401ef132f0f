"""Score completions, with a policy or without one."""
