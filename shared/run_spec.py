"""What a service's own settings make of an environment: inference proposes it, all compare it to the run."""

from shared.config import AgentSettings
from shared.errors import ConfigurationError
from shared.networks.pictures import resolved_network
from shared.specs import EnvironmentSpec, NetworkSpec, RunSpec


def own_spec(settings: AgentSettings, environment: EnvironmentSpec) -> RunSpec:
    """The spec of a run in `environment` with these settings."""
    is_r2d2 = settings.agent == "r2d2"
    return RunSpec(
        environment=environment,
        network=NetworkSpec(
            name=resolved_network(settings.network, environment),
            lstm_size=settings.lstm_size,
            frame_stack=settings.frame_stack,
            hidden_sizes=settings.hidden_sizes,
            dueling_size=settings.dueling_size if is_r2d2 else 0,
        ),
        agent=settings.agent,
        unroll=settings.unroll,
        reward_clip=settings.reward_clip,
        discount=settings.discount if is_r2d2 else 0.0,
        n_steps=settings.n_steps if is_r2d2 else 0,
    )


def check_settings(settings: AgentSettings, spec: RunSpec, *, service: str) -> None:
    """Raises ConfigurationError when the settings of `service` are not those of the run's `spec`."""
    if words := spec.disagreement(own_spec(settings, spec.environment)):
        raise ConfigurationError(f"the settings of {service} are not the run's: {words}")
