"""Seeds, collectives, threads, signals, manifests and errors."""
