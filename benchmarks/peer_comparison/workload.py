"""What every contestant has to do, in numbers."""

UNROLL = 20  # steps of a trajectory
BATCH_TRAJECTORIES = 32  # trajectories of an update
BATCH_STEPS = UNROLL * BATCH_TRAJECTORIES
