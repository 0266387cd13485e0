"""Stores trajectories and samples sequences of them by priority."""
