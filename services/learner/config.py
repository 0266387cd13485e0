"""Configuration of the learner."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.config import (
    AgentSettings,
    DeviceSettings,
    NatsSettings,
    SequenceSettings,
    ServiceSettings,
    Settings,
    SettingsGroup,
)
from shared.kinds import R2D2, VTRACE, Count, Heading, Seed, Size, Threads
from shared.origins import Conflict
from shared.presets import presets_with


class OptimizerSettings(SettingsGroup):
    """How gradients change the weights."""

    heading = Heading.OPTIMIZER

    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """Optimizer of the weights."""
    learning_rate: float = Field(6e-4, gt=0)
    """Learning rate at the first step."""
    learning_rate_schedule: Literal["linear", "constant"] = "linear"
    """linear: decays to 0 at --total-steps."""
    rmsprop_decay: float = Field(0.99, ge=0, lt=1)
    """Decay of RMSProp's mean square."""
    rmsprop_epsilon: float = Field(0.01, gt=0)
    """RMSProp's epsilon, outside the root."""
    rmsprop_momentum: float = Field(0.0, ge=0, lt=1)
    """RMSProp's momentum."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of Adam's mean gradient."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of Adam's mean square."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Adam's epsilon, outside the root."""
    max_gradient_norm: float = Field(40.0, ge=0)
    """Gradients are scaled down to at most this norm; 0: not clipped."""


class LearnerConfig(
    Settings,
    ServiceSettings,
    NatsSettings,
    AgentSettings,
    SequenceSettings,
    OptimizerSettings,
    DeviceSettings,
):
    """Trains a run's network from the trajectories that inference cuts, and publishes its weights.

    V-trace takes trajectories from the work queue, R2D2 sequences of them from the replay service.

    Starts in any order with the other services: it waits for NATS, for the run's spec (which the first
    actor's environment decides) and for trajectories. Ends by itself at --total-steps or --max-seconds;
    SIGTERM saves a checkpoint and exits. One learner per run: a second one is refused.

    Examples:  seedrl learner --run-id pong --run-dir runs/pong --preset atari_vtrace
               seedrl learner --run-id pong --run-dir runs/pong --preset atari_vtrace --resume
    """

    heading = Heading.RUN

    run_dir: Path | None = None
    """Directory for checkpoints, TensorBoard logs and accounts.json; default: runs/RUN_ID."""
    resume: bool = False
    """Go on from the newest checkpoint in --run-dir (or from nothing, when there is none)."""
    seed: Seed | None = None
    """Seed of the network's initial weights and of how --minibatches are dealt out; default: a different one
    each time."""

    total_steps: Count = 10_000_000
    """Environment steps to train for; those in chunks that are refused count, too (not emulator frames; steps
    whose action was ignored are none)."""
    max_seconds: float = Field(0.0, ge=0)
    """Ends training so many seconds after the first trajectory (restarts go on counting); 0: no limit."""

    reward_scale: Annotated[float, Heading.VTRACE] = Field(1.0, gt=0)
    """Rewards are multiplied by this for training, after clipping; returns of 1 to 10 are learned best
    (R2D2 rescales values by itself)."""
    trace_lambda: Annotated[float, VTRACE] = Field(1.0, ge=0, le=1)
    """λ, the decay of the traces."""
    max_rho: Annotated[float, VTRACE] = Field(1.0, gt=0)
    """Bound ρ̄ of the importance weights in the V-trace targets."""
    max_pg_rho: Annotated[float, VTRACE] = Field(1.0, gt=0)
    """Bound of the importance weights in the policy gradient."""
    entropy_cost: Annotated[float, VTRACE] = Field(0.01, ge=0)
    """Weight of the entropy bonus."""
    baseline_cost: Annotated[float, VTRACE] = Field(0.5, ge=0)
    """Weight of the baseline's loss, ½ (target − V)²."""
    loss_reduction: Annotated[Literal["sum", "mean"], VTRACE] = "sum"
    """Losses are summed over a batch's steps (IMPALA, Atari) or averaged (SEED). Learning rate, epsilon and
    gradient clip belong to one of the two."""
    normalize_advantages: Annotated[bool, VTRACE] = False
    """Advantages are brought to mean 0 and deviation 1 in every gradient step, so that the entropy bonus
    weighs the same whatever the rewards are."""
    policy_clip: Annotated[float, VTRACE] = Field(0.0, ge=0)
    """A step has no policy gradient once its action's probability is farther from the acting policy's than
    this, as a ratio, on the side its advantage pushes it to (PPO's clip); 0: never."""
    sample_reuse: Annotated[Count, Heading.VTRACE] = 1
    """Passes over each batch; V-trace corrects for what the policy has moved since the batch was acted."""
    minibatches: Annotated[Size, Heading.VTRACE] = 1
    """Gradient steps per pass: a batch's rows are dealt out anew to so many equal parts. An update is all
    passes."""

    training_threads: Annotated[Threads, Heading.DEVICES, VTRACE] = 1
    """Threads that share the rows of a gradient step, on a CPU; for networks that cost more than the rest."""
    target_update_period: Annotated[Count, R2D2] = 2500
    """Updates after which the target network becomes a copy of the online network."""
    importance_exponent: Annotated[float, R2D2] = Field(0.6, ge=0, le=1)
    """β: how far importance weights make up for what prioritized sampling prefers; 1: fully."""

    max_policy_lag: Annotated[Count, VTRACE] = 100
    """A chunk whose oldest weights are more updates behind than this is refused, not trained."""

    publish_seconds: Annotated[float, Heading.TRAINING] = Field(0.0, ge=0)
    """Least seconds between two publications of the weights; never do they take over a tenth of the time."""
    checkpoint_seconds: Annotated[float, Heading.TRAINING] = Field(60.0, gt=0)
    """Seconds between checkpoints; others are saved at the start, 10 s into a new run, and at the end."""
    keep_checkpoints: Annotated[Count, Heading.TRAINING] = 3
    """Newest checkpoints that are kept."""

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.run_id

    @model_validator(mode="after")
    def _nothing_of_vtrace_is_asked_of_r2d2(self) -> Self:
        for name in ("reward_scale", "sample_reuse", "minibatches"):
            if self.agent == "r2d2" and (value := getattr(self, name)) != 1:
                raise Conflict(
                    f"{name} is for V-trace: with agent r2d2 it must be 1, not {value:g}",
                    setting=name,
                    advice=f"presets for r2d2 are {', '.join(presets_with('agent', 'r2d2'))}",
                )
        return self

    @model_validator(mode="after")
    def _a_sequence_holds_the_rewards_of_a_sum(self) -> Self:
        if self.agent == "r2d2" and self.n_steps > self.sequence_length:
            raise ValueError(
                f"n_steps ({self.n_steps}) must not exceed sequence_length ({self.sequence_length})"
            )
        return self

    @model_validator(mode="after")
    def _minibatches_are_equal(self) -> Self:
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of minibatches ({self.minibatches})"
            )
        return self
