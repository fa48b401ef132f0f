"""Checks of plugins by kind; hf_rlhf.testing is their public face."""
