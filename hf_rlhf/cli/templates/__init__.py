"""What `hf-rlhf new` writes: one plugin of each axis, its test in `tests`, and the files around them (`*.txt`).

`my_name`, `MyName` and `hf_rlhf_my_name` become the names of the new plugin, its class and its module.
"""
