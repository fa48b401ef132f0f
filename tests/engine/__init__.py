"""Tests with a real vLLM server in an environment of its own: `make test-engine`."""
