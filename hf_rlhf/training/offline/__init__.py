"""Train on a dataset, without rollouts, through TRL's and transformers' trainers."""
