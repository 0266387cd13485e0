"""The services and the commands that run them."""
