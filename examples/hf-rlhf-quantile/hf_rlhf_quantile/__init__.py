"""Quantile advantage estimation for hf_rlhf."""
