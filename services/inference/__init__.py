"""Holds the policy, batches observations, cuts trajectories."""
