"""Module for vLLM's own environment, in a folder of its own: `vllm.py` beside it on a path would be taken for vLLM."""
