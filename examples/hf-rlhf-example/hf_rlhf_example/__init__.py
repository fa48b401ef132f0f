"""A reward and an advantage estimator for hf_rlhf."""
