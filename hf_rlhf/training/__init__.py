"""The step: trainer, collector, rollout buffer, losses and checkpoints."""
