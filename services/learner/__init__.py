"""Trains from trajectories and publishes weights."""
