"""The tests that `hf-rlhf new` writes, one module for each axis; each runs the conformance kit and one closed form."""
