"""Benchmarks as commands."""
