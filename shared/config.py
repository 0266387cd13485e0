"""Configuration: defaults < preset (YAML) < environment (`SEEDRL_…`) < command line.

Each service has one frozen model, built from the groups of settings below; what two services must agree
on stands in one group. A preset and the environment may name settings of any service (one `.env` file or
preset serves them all), so names are checked against all models together, and each model takes its own.
"""

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliSuppress,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from shared.errors import ConfigurationError
from shared.kinds import LONGEST_SECONDS, MAX_SIZE, R2D2, Device, Heading, Only, Size, Threads, Unused
from shared.origins import Origin, mistakes
from shared.presets import ENV_PREFIX, Preset, read_preset
from shared.scalars import as_given
from shared.secrets import check_command_line, check_preset, with_secret_from_file
from shared.sources import command_line, environment, flag, settings_names
from shared.subjects import validated_run_id

SECRETS = frozenset({"inference_token", "nats_token"})
BATCHES_HELD = 2  # by the learner


class Settings(BaseSettings):
    """Base of every command's configuration."""

    heading: ClassVar[Heading]

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        env_prefix=ENV_PREFIX,
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
    )

    preset: str | None = None
    """Name of a preset (see presets/) or path of a YAML file with settings, applied before all others."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` merged: the environment is one of its sources, not read a second time here."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        return as_given(value, cls.model_fields[str(info.field_name)].annotation)

    @classmethod
    def loaded(cls, arguments: Sequence[str], *, prog: str, known: Iterable[type["Settings"]]) -> Self:
        """The configuration from preset, environment and command line; see `load`."""
        return load(cls, arguments, prog=prog, known=known)


class SettingsGroup(BaseModel):
    """Base of the groups of settings; a field's docstring is its help text."""

    heading: ClassVar[Heading]

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        use_attribute_docstrings=True, allow_inf_nan=False
    )


class LogSettings(SettingsGroup):
    """How a service logs."""

    heading = Heading.LOGGING

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe events that are logged."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """json for machines, text for people; auto: text on a terminal, else json."""


class RunSettings(SettingsGroup):
    """Which run a service belongs to."""

    heading = Heading.RUN

    run_id: str = "default"
    """Run this service belongs to; several runs share one NATS server without meeting."""

    @field_validator("run_id")
    @classmethod
    def _run_id_can_be_a_subject(cls, value: str) -> str:
        try:
            return validated_run_id(value)
        except ConfigurationError as error:
            raise ValueError(str(error)) from error


class HttpSettings(SettingsGroup):
    """Where a service answers /healthz, /readyz, /metrics and /status."""

    heading = Heading.LOGGING

    http_host: str = "127.0.0.1"
    """Address the HTTP endpoints bind to."""
    http_port: int = Field(0, ge=0, le=65535)
    """Port of the HTTP endpoints; 0 takes a free one and logs it."""
    watchdog_seconds: float = Field(60.0, gt=0, le=LONGEST_SECONDS)
    """A service that makes no progress for so long dumps all its stacks to the log and fails /healthz."""


class ServiceSettings(LogSettings, RunSettings, HttpSettings):
    """What every service has."""

    heading = Heading.LOGGING

    grace_seconds: float = Field(10.0, gt=0, le=LONGEST_SECONDS)
    """How long a service may take to drain and save after SIGTERM."""


class NatsSettings(SettingsGroup):
    """How to reach NATS."""

    heading = Heading.ACCESS

    nats_url: str = "nats://127.0.0.1:4222"
    """URL of the NATS server."""
    nats_token: CliSuppress[SecretStr | None] = None
    """Token of the NATS server; given as SEEDRL_NATS_TOKEN."""
    nats_token_file: Path | None = None
    """File with the token of the NATS server, instead of SEEDRL_NATS_TOKEN in the environment."""
    nats_ca: Path | None = None
    """PEM file with the certificates that vouch for the NATS server's; with it, TLS is insisted on."""
    nats_cert: Path | None = None
    """PEM file with this client's certificate, for a NATS server that asks for one; with --nats-key."""
    nats_key: Path | None = None
    """PEM file with the key of --nats-cert."""
    connect_timeout: float = Field(10.0, gt=0)
    """Seconds after which a command (not a service) gives up on a NATS server it cannot reach."""

    @classmethod
    def of(cls, config: BaseModel, **changed: Any) -> "NatsSettings":
        """These settings out of a larger configuration, but for what is `changed`."""
        values = {name: getattr(config, name) for name in NatsSettings.model_fields}
        return NatsSettings.model_validate({**values, **changed})

    @model_validator(mode="before")
    @classmethod
    def _nats_token_from_its_file(cls, values: dict[str, Any]) -> dict[str, Any]:
        return with_secret_from_file(values, "nats_token")

    @model_validator(mode="after")
    def _nats_certificate_and_key(self) -> Self:
        if (self.nats_cert is None) != (self.nats_key is None):
            raise ValueError("nats_cert and nats_key go together")
        if self.nats_cert is not None and self.nats_ca is None:
            raise ValueError("nats_cert wants nats_ca: without TLS nobody asks for it")
        return self


class InferenceAccess(SettingsGroup):
    """What actors must bring to be served by inference."""

    heading = Heading.ACCESS

    inference_token: CliSuppress[SecretStr | None] = None
    """Token that actors must bring; given as SEEDRL_INFERENCE_TOKEN."""
    inference_token_file: Path | None = None
    """File with the token that actors must bring, instead of SEEDRL_INFERENCE_TOKEN in the environment.
    Inference takes any of the file's lines, actors bring the first."""

    @model_validator(mode="before")
    @classmethod
    def _inference_token_from_its_file(cls, values: dict[str, Any]) -> dict[str, Any]:
        return with_secret_from_file(values, "inference_token")

    @property
    def inference_tokens(self) -> list[str]:
        """The tokens, the newest first; empty where none is wanted."""
        secret = self.inference_token.get_secret_value() if self.inference_token else ""
        return [line.strip() for line in secret.splitlines() if line.strip()]


class NetworkSettings(SettingsGroup):
    """The network that inference and the learner of one run have."""

    heading = Heading.NETWORK

    network: str = "auto"
    """mlp, nature, impala_shallow, impala_deep or your own module:Class; auto: impala_shallow or mlp."""
    lstm_size: int = Field(0, ge=0, le=MAX_SIZE)
    """Units of the LSTM core; 0: none."""
    hidden_sizes: tuple[Size, ...] = (64, 64)
    """Layer sizes of the mlp network, with commas between them."""
    dueling_size: Annotated[int, R2D2] = Field(0, ge=0, le=MAX_SIZE)
    """Units of the hidden layer in each of the two heads, V and A; 0: straight linear."""
    frame_stack: int = Field(1, ge=1, le=64)
    """Newest frames the policy sees at once; inference stacks them, actors send single frames."""


class AgentSettings(NetworkSettings):
    """What inference and the learner of one run must agree on."""

    heading = Heading.TRAINING

    agent: Annotated[Literal["vtrace", "r2d2"], Heading.RUN] = "vtrace"
    """Algorithm: vtrace (IMPALA), or r2d2 (recurrent Q-learning from a prioritized replay)."""
    unroll: Size = 20
    """Steps of a trajectory chunk (T)."""
    reward_clip: float = Field(0.0, ge=0)
    """Rewards are clipped to ± this for training and as network input; 0: not clipped."""
    discount: float = Field(0.99, ge=0, le=1)
    """Discount γ of future rewards."""
    n_steps: Annotated[Size, R2D2] = 5
    """Rewards that are summed before the bootstrap (n)."""
    batch_size: Size = 32
    """Trajectories (rows of T steps; sequences for R2D2) per update."""
    max_queued_batches: int = Field(3, le=MAX_SIZE)
    """Batches in the work queue, with the two that the learner holds, before actors are slowed down; at least
    3."""

    @field_validator("max_queued_batches")
    @classmethod
    def _queue_is_larger_than_what_is_held(cls, value: int) -> int:
        """What the learner holds stays in the queue until its update is done."""
        if value <= BATCHES_HELD:
            raise ValueError(
                f"must be at least {BATCHES_HELD + 1}: "
                "the learner holds one batch in training and one prefetched"
            )
        return value


class SequenceSettings(SettingsGroup):
    """What replay and the learner of an R2D2 run must agree on; without meaning for V-trace."""

    heading = Heading.R2D2

    burn_in: Annotated[int, R2D2] = Field(40, ge=0, le=MAX_SIZE)
    """Steps at a sequence's start that only bring the recurrent state up to date."""
    sequence_length: Annotated[Size, R2D2] = 80
    """Steps of a sequence after --burn-in, those that are trained; a multiple of --unroll."""
    priority_eta: Annotated[float, R2D2] = Field(0.9, ge=0, le=1)
    """η: a sequence's priority is η·max|δ| + (1 − η)·mean|δ| over its trained steps."""

    @model_validator(mode="after")
    def _sequences_are_whole_chunks(self) -> Self:
        unroll = getattr(self, "unroll", 1)
        if getattr(self, "agent", "") == "r2d2" and self.sequence_length % unroll:
            raise ValueError(
                f"sequence_length ({self.sequence_length}) must be a multiple of unroll ({unroll})"
            )
        return self


class DeviceSettings(SettingsGroup):
    """Where and how the network computes."""

    heading = Heading.DEVICES

    device: Device = "auto"
    """cpu, cuda, cuda:N; auto: cuda where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast for convolutional networks where the device has the instructions.

    On a GPU, float32 has convolutions and LSTM in TF32, as is torch's default.
    """
    torch_threads: Threads = 1
    """Threads of torch in this process; those of several services on one machine spin against each other."""


T = TypeVar("T", bound=Settings)


def load(
    model: type[T],
    arguments: Sequence[str],
    *,
    prog: str,
    known: Iterable[type[BaseModel]] = (),
    preset_name: str | None = None,
) -> T:
    """`model` from preset, environment and command line.

    `known`: all models of the project, against whose fields the preset's and the environment's names are
    checked. `preset_name` is used when neither environment nor command line names a preset. Raises
    ConfigurationError, all mistakes on one line. `--help` prints and raises SystemExit(0).
    """
    names = settings_names(model, *known)
    options, variables = _said(model, arguments, names, prog=prog)
    preset_name = options.get("preset", variables.get("preset", preset_name))
    preset = _preset(model, str(preset_name), names) if preset_name is not None else Preset({}, {})
    values = {**preset.values, **variables, **options}
    _check_complete(model, values, prog)
    origins = (
        Origin(options, partial(flag, model)),
        Origin(variables, lambda name: ENV_PREFIX + name.upper()),
        Origin(
            preset.values,
            lambda name: f"preset {preset.sources[name]}: {name}",
            preset=lambda name: preset.sources[name],
        ),
    )
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError("; ".join(mistakes(error, origins, secrets=SECRETS))) from error
    except SettingsError as error:
        raise ConfigurationError(str(error)) from error
    _check_agent(config, options)
    return config


def given(
    model: type[Settings], arguments: Sequence[str], *, prog: str, known: Iterable[type[BaseModel]]
) -> dict[str, Any]:
    """What environment and command line say, as `load` takes it but not validated. Raises as it does."""
    options, variables = _said(model, arguments, settings_names(model, *known), prog=prog)
    return {**variables, **options}


def _said(
    model: type[Settings], arguments: Sequence[str], names: set[str], *, prog: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    options = command_line(model, arguments, prog=prog)
    check_command_line(options, SECRETS, ENV_PREFIX)
    _check_use(model, options, prog)
    return options, environment(model, names)


def _preset(model: type[Settings], name: str, names: set[str]) -> Preset:
    preset = read_preset(name, names)
    check_preset(preset, SECRETS, ENV_PREFIX)
    return preset._replace(
        values={name: value for name, value in preset.values.items() if name in model.model_fields}
    )


def _check_complete(model: type[Settings], said: Collection[str], prog: str) -> None:
    """Raises ConfigurationError for settings without a default that nobody said."""
    fields = model.model_fields.items()
    missing = [flag(model, name) for name, field in fields if field.is_required() and name not in said]
    if missing:
        raise ConfigurationError(f"{' and '.join(missing)} must be given (see {prog} --help)")


def _check_use(model: type[Settings], options: Iterable[str], prog: str) -> None:
    """Raises ConfigurationError for an option that the command would ignore."""
    for name in options:
        for mark in model.model_fields[name].metadata if name in model.model_fields else ():
            if isinstance(mark, Unused):
                raise ConfigurationError(f"{flag(model, name)} is not for {prog}: {mark.advice}")


def _check_agent(config: Settings, options: Iterable[str]) -> None:
    """Raises ConfigurationError for an option that the configured agent has no use for.

    Presets and the environment may serve runs of both.
    """
    agent = getattr(config, "agent", None)
    for name in options:
        field = type(config).model_fields.get(name)
        for mark in field.metadata if field is not None and agent is not None else ():
            if isinstance(mark, Only) and mark.agent != agent:
                raise ConfigurationError(f"{flag(type(config), name)} is for agent {mark.agent}, not {agent}")


def secret_values(config: BaseModel) -> list[str]:
    """The secrets in `config`, for whoever must not write them down."""
    values = (getattr(config, name, None) for name in SECRETS)
    return [
        line for value in values if isinstance(value, SecretStr) for line in value.get_secret_value().split()
    ]
