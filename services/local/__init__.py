"""The supervisor: `seedrl train` runs every service of a run as a child process."""
