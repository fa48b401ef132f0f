"""Episodes: environments that play with the policy, in lockstep around the rollout engine."""
