"""Faults that a run must survive, injected for real: `python -m benchmarks.faults`."""
