"""The commands that are no services: eval, status and control."""
