"""One local run: which services there are, how each is told what to do, and in which order they end."""

import asyncio
import os
from collections.abc import Callable, Sequence
from functools import partial
from socket import gethostname

from pydantic import SecretStr

from services.learner.accounts import has_begun, load_accounts
from services.local.config import CONFIG_FILE, INFERENCE_ACCESS, NATS_ACCESS, TrainConfig
from services.local.connection import Connection
from services.local.directory import newest_update
from services.local.process import ChildProcess, seedrl
from services.local.supervisor import ServiceFailed, SupervisedService
from shared.addresses import free_port, joined
from shared.config import NatsSettings
from shared.errors import RunError
from shared.presets import ENV_PREFIX

# Of the processor, what actors would take from the learner comes back as trajectories that wait and grow old.
ACTOR_NICENESS = 5


class LocalRun:
    """The services of a run below one supervisor."""

    def __init__(
        self, config: TrainConfig, nats: NatsSettings, steps: Callable[[], int | None] = lambda: None
    ) -> None:
        """`steps`: how far the run has come, where that is known."""
        self._steps = steps
        self.config = config
        self.nats = nats
        self._port = free_port(config.host, config.port)
        self.inference_url = joined(_reachable(config.host), self._port)
        is_open = config.host != _reachable(config.host)
        self.outer_inference_url = joined(gethostname(), self._port) if is_open else None  # for other hosts
        self._actor_ports: dict[str, int] = {}
        self.services = {
            "inference": self._service("inference", self._inference_command),
            **({"replay": self._service("replay", self._replay_command)} if config.agent == "r2d2" else {}),
            "learner": self._service("learner", self._learner_command),
            **{
                name: self._service(name, partial(self._actor_command, name))
                for name in (f"actor-{i}" for i in range(config.actors))
            },
        }

    async def until_done(self, stop: asyncio.Event) -> bool:
        """Runs until the learner is done or `stop` is set; whether the learner was done by itself.

        Raises ServiceFailed when a service fails for good, or cannot save at the end what was learned.
        Afterwards every service has ended.
        """
        tasks = {
            asyncio.create_task(service.run_until_done(), name=name)
            for name, service in self.services.items()
        }
        learner = next(task for task in tasks if task.get_name() == "learner")
        stopped = asyncio.create_task(stop.wait(), name="stop")
        pending = {*tasks, stopped}
        unsaved: ServiceFailed | None = None
        try:
            while not (stopped.done() or learner.done()):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finished = learner.done()
        finally:
            stopped.cancel()
            unsaved = await self._end()
            await asyncio.gather(*tasks, return_exceptions=True)
        if unsaved is not None:
            raise unsaved
        return finished

    async def _end(self) -> ServiceFailed | None:
        """Actors first, then inference, then the learner, which saves, and replay, which it saves with.

        What kept one of the latter two from saving something.
        """
        grace = self.config.grace_seconds + 1.0
        actors = [service for name, service in self.services.items() if name.startswith("actor")]
        await asyncio.gather(*(actor.end(grace_seconds=grace) for actor in actors))
        await self.services["inference"].end(grace_seconds=grace)
        failed = await self.services["learner"].end(grace_seconds=grace)
        if failed is not None and failed.exit_status == 1 and self._has_saved_all():
            failed = None
        if "replay" in self.services:
            failed = await self.services["replay"].end(grace_seconds=grace) or failed
        return failed

    def _has_saved_all(self) -> bool:
        """Whether no update was trained after the newest checkpoint, as far as can be told."""
        directory = self.config.directory
        try:
            return load_accounts(directory).updates <= (newest_update(directory) or 0)
        except RunError:
            return False

    def kill(self) -> None:
        """Ends every service at once; what was trained since the newest checkpoint is lost."""
        for service in self.services.values():
            service.kill()

    @property
    def actor_addresses(self) -> dict[str, str]:
        """Where each actor that was started answers HTTP, by its name."""
        host = _reachable(self.config.http_host)
        host = "::1" if self.config.http_host == "::" else host  # HTTP is then served over IPv6 alone
        return {name: joined(host, port) for name, port in self._actor_ports.items()}

    @property
    def connection(self) -> Connection:
        """How other commands reach this run."""
        token = self.nats.nats_token
        return Connection(
            inference_url=self.inference_url,
            nats_token=token.get_secret_value() if token else None,
            nats_url=self.nats.nats_url,
            pid=os.getpid(),
            run_id=self.config.run_id,
        )

    def _service(self, name: str, command: Callable[[], Sequence[str]]) -> SupervisedService:
        logs = self.config.directory / "logs"
        logs.mkdir(exist_ok=True)
        is_actor = name.startswith("actor")
        return SupervisedService(
            ChildProcess(
                name,
                command,
                environment=self._access(name.partition("-")[0]),
                log=logs / f"{name}.log",
                niceness=ACTOR_NICENESS if is_actor else 0,
            ),
            self._steps,
            ends_the_run=name == "learner",
        )

    def _access(self, service: str) -> dict[str, str]:
        """What the service needs to reach the others, in its environment: process lists do not show that."""
        settings: dict[str, object] = {}
        if service != "actor":
            settings |= {name: getattr(self.nats, name) for name in NATS_ACCESS}
        if service in INFERENCE_ACCESS:
            settings |= {name: getattr(self.config, name) for name in INFERENCE_ACCESS[service]}
        return {
            ENV_PREFIX + name.upper(): _told(value) for name, value in settings.items() if value is not None
        }

    def _common(self) -> list[str]:
        preset = str(self.config.directory / CONFIG_FILE)
        return ["--preset", preset, "--http-host", self.config.http_host, "--log-format", "json"]

    def _inference_command(self) -> list[str]:
        return seedrl("inference", *self._common(), "--host", self.config.host, "--port", str(self._port))

    def _replay_command(self) -> list[str]:
        return seedrl("replay", *self._common(), "--run-dir", str(self.config.directory))

    def _learner_command(self) -> list[str]:
        directory = self.config.directory
        resume = ["--resume"] if has_begun(directory) else []
        return seedrl("learner", *self._common(), "--run-dir", str(directory), *resume)

    def _actor_command(self, name: str) -> list[str]:
        # Another port at each start: what an environment forked may hold the last one after the actor's end.
        self._actor_ports[name] = port = free_port(self.config.http_host)
        where = ["--inference-url", self.inference_url, "--actor-id", name, "--http-port", str(port)]
        return seedrl("actor", self.config.env, *self._common(), *where)


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


def _told(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)
