"""Files that `hf-rlhf new` writes around the example of an axis (`hf_rlhf.registry.examples`).

`everything*.py` holds the optional members that `--full` adds to the example's class; the `*.txt` files are the rest of
a package. `my_name`, `my-name`, `my_axis` and `MY_...` are replaced.
"""
