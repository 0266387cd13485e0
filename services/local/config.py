"""Configuration of `seedrl train`: all that a service of the run can be told, and the supervisor's own."""

import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic_settings import CliSuppress

from services.actor.config import ActorConfig
from services.inference.config import InferenceConfig
from services.learner.config import LearnerConfig
from services.local.reading import reading
from services.replay.config import ReplayConfig
from shared.certificates import trusting
from shared.config import Settings, given, load
from shared.errors import ConfigurationError, RunError
from shared.files import replace_file
from shared.kinds import R2D2, Heading, Seed, Unused
from shared.presets import preset_path, read_preset
from shared.secrets import without_credentials

CONFIG_FILE = "config.yaml"
LOCK_FILE = "lock"  # in every run directory
_NO_PRESET = "--resume wants no --preset: the run has its own configuration"
NATS_ACCESS = ("nats_url", "nats_token", "nats_ca", "nats_cert", "nats_key")
INFERENCE_ACCESS = {
    "inference": ("inference_token", "tls_cert", "tls_key"),
    "actor": ("inference_token", "tls_ca"),
}
"""How services reach one another: nothing of a run's, so not in its configuration, but for NATS's address."""
_ACCESS = {*NATS_ACCESS[1:], *INFERENCE_ACCESS["inference"], *INFERENCE_ACCESS["actor"]}
_OWN_OF_ONE_PROCESS = {"actor_id", "http_host", "http_port", "inference_url", "resume", "role", "run_dir"}


class TrainConfig(LearnerConfig, ReplayConfig, InferenceConfig, ActorConfig):
    """Trains an agent on a Gymnasium environment with every service on this machine.

    Starts NATS, inference, a learner, actors and, for --agent r2d2, replay; restarts what dies, shows a live
    table, and ends by itself at --total-steps or --max-seconds; Ctrl-C saves and exits. The run directory
    then holds the configuration, checkpoints, TensorBoard logs and summary.json.

    Without a preset, Atari takes atari_vtrace; --agent r2d2 takes atari_r2d2_small, or cartpole_r2d2 for
    anything else.

    Examples:  seedrl train CartPole-v1 --preset cartpole
               seedrl train CartPole-v1 --agent r2d2
               seedrl train ALE/Pong-v5 --actors 1 --max-seconds 180
               seedrl train my_package:MyEnv-v0 --network my_package.nets:Net --total-steps 1000000
               seedrl train --run-dir runs/x --resume
    """

    actors: Annotated[int, Heading.ENVIRONMENTS] = Field(1, ge=1, le=1024)
    """Actor processes."""
    run_dir: Path | None = None
    """Directory of the run; default: a new one below runs/."""
    run_id: str = "default"
    """Name of the run on its NATS server, where several do not meet; default: its directory's name and six
    hex digits."""
    resume: bool = False
    """Go on with the run in --run-dir: its configuration (options given here win), checkpoint, queue and
    replay."""
    eval_episodes: Annotated[int, R2D2] = Field(30, ge=0, lt=2**63)
    """Episodes played with the trained policy at the end of the run, for eval_return in summary.json; 0:
    none. (Those of training have actors that explore.)"""
    seed: Seed | None = None
    """Seed of all that is random: environments, initial weights, actions, what replay draws; default: a
    different one each time."""
    nats_url: str | None = None  # type: ignore[assignment]
    """URL of a NATS server to use; default: an embedded one, reachable from this machine only."""
    port: int = Field(0, ge=0, le=65535)
    """Port of the inference service; 0 takes a free one."""
    actor_id: Annotated[CliSuppress[str], Unused("actors have names of their own; leave it out")] = "actor"
    """Given to each actor by the supervisor."""
    inference_url: Annotated[
        CliSuppress[str], Unused("actors are told where inference is; give --host and --port")
    ] = "127.0.0.1:50051"
    """Given to each actor by the supervisor."""
    http_port: Annotated[
        CliSuppress[int], Unused("every service takes a free port of --http-host and logs it; leave it out")
    ] = 0
    """Each service takes a free port."""
    role: Annotated[
        CliSuppress[Literal["train"]],
        Unused("its actors all train; start seedrl actor with --role eval beside it, or use seedrl eval"),
    ] = "train"
    """That of every actor."""

    @model_validator(mode="before")
    @classmethod
    def _run_id_follows_the_directory(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Every run has a directory, and is called after it unless it was given a name."""
        if _is_true(values.get("resume")) and not values.get("run_dir"):
            raise ValueError("--resume wants --run-dir")
        run_dir = values.get("run_dir") or _new_run_dir(str(values.get("env", "run")))
        if not isinstance(run_dir, str | Path):
            return values
        run_dir = Path(run_dir)
        if str(run_dir).startswith("-"):  # which no command would take for a path
            run_dir = run_dir.absolute()
        return {"run_id": _new_run_id(run_dir), **values, "run_dir": run_dir}

    @field_validator("tls_ca")
    @classmethod
    def _certificates_can_be_used(cls, value: Path | None) -> Path | None:
        """What actors would say, but before anything is started."""
        if value is not None:
            try:
                trusting("tls_ca", value)
            except ConfigurationError as error:
                raise ValueError(str(error).removeprefix("tls_ca: ")) from error
        return value

    @model_validator(mode="after")
    def _certificate_can_be_used(self) -> Self:
        """What inference would say, but before anything is started."""
        if self.tls_cert is not None and self.tls_key is not None:
            from services.inference.tls import Certificate  # takes long to import

            Certificate(self.tls_cert, self.tls_key)
        if (self.tls_cert is None) != (self.tls_ca is None):
            raise ValueError("tls_cert and tls_ca go together: the run's own actors speak TLS, too")
        return self

    @model_validator(mode="after")
    def _inference_has_room_for_all(self) -> Self:
        environments = self.actors * self.groups * self.group_size
        if environments > self.max_environments:
            raise ValueError(
                f"max_environments ({self.max_environments}) must be at least actors × groups × group_size "
                f"({self.actors} × {self.groups} × {self.group_size} = {environments})"
            )
        return self

    @classmethod
    def loaded(cls, arguments: Sequence[str], *, prog: str, known: Iterable[type[Settings]]) -> Self:
        """As `load`; some runs have a preset when none is named, a resumed run its own configuration."""
        said = given(cls, arguments, prog=prog, known=known)
        if _is_true(said.get("resume")) and (run_dir := said.get("run_dir")):
            return cls._resumed(Path(run_dir), said, arguments, prog=prog, known=known)
        config = load(cls, arguments, prog=prog, known=known, preset_name=cls._default_preset(said))
        if config.resume:  # by a preset, as is the directory perhaps
            raise RunError(_NO_PRESET)
        if config.preset is not None and "run_id" not in said and _is_of_a_run(config.preset):
            return config.model_copy(update={"run_id": _new_run_id(config.directory)})
        return config

    @classmethod
    def _resumed(
        cls,
        run_dir: Path,
        said: Mapping[str, Any],
        arguments: Sequence[str],
        *,
        prog: str,
        known: Iterable[type[Settings]],
    ) -> Self:
        if "preset" in said:
            raise RunError(_NO_PRESET)
        saved = run_dir / CONFIG_FILE
        if not saved.is_file():
            raise RunError(f"cannot resume {run_dir}: it holds no run ({CONFIG_FILE} is missing)")
        resumed = load(cls, arguments, prog=prog, known=known, preset_name=str(saved))
        was = saved_env(run_dir)
        if resumed.env != was:
            raise RunError(f"cannot resume {run_dir} with {resumed.env}: its environment is {was}")
        return resumed

    @classmethod
    def _default_preset(cls, said: Mapping[str, Any]) -> str | None:
        """That of a run of which no more was said than this."""
        env, agent = (said.get(name, cls.model_fields[name].default) for name in ("env", "agent"))
        if agent == "r2d2":
            return "atari_r2d2_small" if is_atari(str(env)) else "cartpole_r2d2"
        return "atari_vtrace" if is_atari(str(env)) else None

    @property
    def directory(self) -> Path:
        """The run directory."""
        assert self.run_dir is not None
        return self.run_dir


def is_atari(env: str) -> bool:
    """Whether it is one of ale-py's own ids, which may be written with the module."""
    return env.rpartition(":")[2].startswith("ALE/")


def _is_of_a_run(preset: str) -> bool:
    """Whether the run id in `preset` is that of another run, in whose directory it stands."""
    source = read_preset(preset).sources.get("run_id")
    return source is not None and (preset_path(source).parent / LOCK_FILE).exists()


def _new_run_id(run_dir: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", run_dir.name).strip("-")[:48] or "run"
    return f"{name}-{secrets.token_hex(3)}"


def saved_env(run_dir: Path) -> str:
    """The environment of the run in `run_dir`. Raises RunError when its configuration does not say it."""
    path = run_dir / CONFIG_FILE
    with reading(path):
        return str(yaml.safe_load(path.read_text())["env"])


def write_config(config: TrainConfig, path: Path) -> None:
    """Writes the resolved configuration, whole, without secrets: a preset for every service of the run."""
    values = config.model_dump(
        mode="json", exclude=_OWN_OF_ONE_PROCESS | {"preset"} | _ACCESS, exclude_none=True
    )
    if config.nats_url is not None:
        values["nats_url"] = without_credentials(config.nats_url)
    write_file(path, yaml.safe_dump(values, sort_keys=True).encode())


def write_file(path: Path, content: bytes) -> None:
    """Puts `content` in the place of `path` in one step. Raises RunError when it cannot be written."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def _is_true(said: object) -> bool:
    try:
        return TypeAdapter(bool).validate_python(said)
    except ValidationError:
        return False


def _new_run_dir(env: str) -> Path:
    name = (
        re.sub(r"[^A-Za-z0-9]+", "-", env.rpartition(":")[2].rpartition("/")[2]).strip("-").lower() or "run"
    )
    # Runs that a loop in a shell starts begin in the same second.
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
