"""Throughput of seedrl beside that of other systems, measured in turns on one machine."""
