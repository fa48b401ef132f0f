"""Tensors: rows, packing, attention, the LM head, the policy and its reference."""
