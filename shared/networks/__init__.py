"""The models that inference and the learner build from the run's spec."""
