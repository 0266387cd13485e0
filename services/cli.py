"""The `seedrl` command: finds the command, loads its configuration, runs it, turns mistakes into one line.

What takes time to import is imported within `main`, so that Ctrl-C is answered in one line from the start.
"""

import atexit
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from shared.config import Settings

# gRPC reads it when it is imported. Its older way of polling, in the thread that waits for events, spares
# each message hops between threads.
_GRPC_POLLING = ("GRPC_EXPERIMENTS", "-event_engine_listener,-event_engine_client")


class Command(NamedTuple):
    """What a command is for, and where its configuration and its function are; imported when it is chosen."""

    help: str
    config: str
    run: str


# Services: `run(config, *, stop)`, asyncio. Commands: `run(config) -> exit status`.
SERVICES = {
    "actor": Command(
        "steps environments for an inference service",
        "services.actor.config:ActorConfig",
        "services.actor.service:run",
    ),
    "inference": Command(
        "holds the policy, answers actors, cuts trajectories",
        "services.inference.config:InferenceConfig",
        "services.inference.service:run",
    ),
    "replay": Command(
        "stores trajectories, samples sequences of them for R2D2",
        "services.replay.config:ReplayConfig",
        "services.replay.service:run",
    ),
    "learner": Command(
        "trains from trajectories, publishes weights",
        "services.learner.config:LearnerConfig",
        "services.learner.service:run",
    ),
}
COMMANDS = {
    "train": Command(
        "trains an agent, everything on this machine",
        "services.local.config:TrainConfig",
        "services.commands.train:train",
    ),
    "eval": Command(
        "plays episodes with a trained policy",
        "services.commands.config:EvalConfig",
        "services.commands.evaluate:evaluate",
    ),
    "status": Command(
        "what every service of a run does and waits for",
        "services.commands.config:StatusConfig",
        "services.commands.status:status",
    ),
    "control": Command(
        "pause, resume, checkpoint or stop a run",
        "services.commands.config:ControlConfig",
        "services.commands.control:control",
    ),
    "bench pipeline": Command(
        "how close a training comes to what the machine can do",
        "services.bench.config:PipelineConfig",
        "services.bench.pipeline:pipeline",
    ),
    "bench transport": Command(
        "rows per second and latency through inference with a free policy",
        "services.bench.transport_config:TransportConfig",
        "services.bench.transport:transport",
    ),
    "bench replay": Command(
        "sequences per second into and out of a replay service",
        "services.bench.replay_config:ReplayBenchConfig",
        "services.bench.replay:replay",
    ),
    **SERVICES,
}
_INTERRUPTED = 130  # as a shell says it of SIGINT

# Which extra brings a module that a role needs.
_EXTRAS = {
    "ale_py": "atari",
    "grpc_health": "inference",
    "grpc_reflection": "inference",
    "gymnasium": "actor",
    "nats": "inference",
    "rich": "learner",
    "safetensors": "inference",
    "tensorboard": "learner",
    "torch": "inference",
    "zstandard": "inference",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (0: fine, 2: the person's mistake; see shared/errors.py)."""
    os.environ.setdefault(*_GRPC_POLLING)
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, _ended_early)
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return _failed("interrupted", _INTERRUPTED)


def _ended_early(number: int, frame: object) -> None:
    """Before a service heeds its signals: those to a container's first process are lost where nobody does."""
    del frame
    os._exit(128 + number)


def _main(arguments: Sequence[str] | None) -> int:
    from shared.errors import SeedrlError

    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["bench"]:  # one command with its next word
        words = [" ".join(words[:2]), *words[2:]]
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help", "bench", "bench -h", "bench --help"):
        print(_usage("bench " if name.startswith("bench") else ""))
        return 0 if words else 2
    if name == "--version":
        from importlib.metadata import version

        print(f"seedrl {version('seedrl')}")
        return 0
    try:
        return _run(name, words[1:])
    except SeedrlError as error:
        return _failed(" ".join(str(error).split()), error.exit_status)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        return _failed(f"{error.name} is not installed; pip install 'seedrl[{extra}]'", 2)


def leave() -> NoReturn:
    """Runs one command and ends the process, without taking torch apart first: that takes up to a second."""
    status = main()
    atexit._run_exitfuncs()  # children of multiprocessing end with it
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (BrokenPipeError, ValueError):  # nobody reads any more, or it is closed
            pass
        except OSError as error:
            status = status or _failed(f"cannot write what was to be said: {error.strerror}", 1)
    os._exit(status)


def known_settings() -> "tuple[type[Settings], ...]":
    """All configurations: a preset or the environment may hold settings for any of them."""
    return tuple(_imported(command.config) for command in COMMANDS.values())


def _run(name: str, arguments: Sequence[str]) -> int:
    from shared.config import ServiceSettings, secret_values
    from shared.errors import ConfigurationError
    from shared.working_directory import see_working_directory

    if name not in COMMANDS:
        raise ConfigurationError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
    # Before anything imports grpc, whose core would write lines of its own into the log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    see_working_directory()  # for a user's own environments and networks
    command = COMMANDS[name]
    model: type[Settings] = _imported(command.config)
    config = model.loaded(arguments, prog=f"seedrl {name}", known=known_settings())
    run = _imported(command.run)
    if name not in SERVICES:
        return int(run(config))
    from shared.runtime import run_service
    from shared.telemetry import configure_logging

    assert isinstance(config, ServiceSettings)
    configure_logging(config.log_level, config.log_format, name, secrets=secret_values(config))
    return run_service(lambda stop: run(config, stop=stop), grace_seconds=config.grace_seconds)


def _imported(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _failed(text: str, status: int) -> int:
    print(f"seedrl: {text}", file=sys.stderr)
    return status


def _usage(beginning: str) -> str:
    """What the commands do whose names begin so."""
    named = {name: command.help for name, command in COMMANDS.items() if name.startswith(beginning)}
    lines = [f"  {name:<{max(map(len, named))}}  {words}" for name, words in named.items()]
    return "\n".join(
        [
            "usage: seedrl COMMAND [OPTIONS]     seedrl COMMAND --help tells about one command",
            "",
            "SEED RL for PyTorch and Gymnasium: actors, central inference and a learner as services.",
            "",
            *lines,
            "",
            "Start with:  seedrl train CartPole-v1 --preset cartpole",
            "             seedrl train ALE/Pong-v5",
        ]
    )


if __name__ == "__main__":
    leave()
