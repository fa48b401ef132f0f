"""Define what hf_rlhf.axes re-exports: base class, metrics, reward sources, offline trainers."""
