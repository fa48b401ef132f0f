"""`python -m hf_rlhf`, and `accelerate launch -m hf_rlhf`."""

from hf_rlhf.cli.main import main

if __name__ == "__main__":
    main()
