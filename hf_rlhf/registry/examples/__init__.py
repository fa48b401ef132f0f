"""One complete plugin per axis: what `hf-rlhf show AXIS` prints and `hf-rlhf new AXIS NAME` copies."""
