"""Replay: chunk rows from the work queue, kept as prioritized sequences that the learner samples."""
