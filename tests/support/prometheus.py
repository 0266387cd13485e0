"""The real Prometheus server on the shipped configuration and rules; only where it finds services differs."""

import contextlib
import json
import os
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from shared.addresses import free_port
from tests.support.promtool import program

DEPLOYED = Path(__file__).resolve().parents[2] / "deploy/prometheus"
_POLL_SECONDS = 0.2


class Prometheus:
    """A server that runs, and what it sees."""

    def __init__(self, directory: Path, port: int) -> None:
        self._directory = directory
        self._url = f"http://127.0.0.1:{port}"

    def watch(self, addresses: Mapping[str, str]) -> None:
        """From now on the services are there; a service that comes back elsewhere stays the same instance."""
        for job in ("actor", "inference", "learner", "replay"):
            targets = [
                {"targets": [address], "labels": {"instance": name}}
                for name, address in addresses.items()
                if name.partition("-")[0] == job
            ]
            unfinished = self._directory / "unfinished"
            unfinished.write_text(json.dumps(targets))
            os.replace(unfinished, self._directory / f"{job}.json")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The newest value of every series."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def firing(self) -> dict[str, list[dict[str, Any]]]:
        """The alerts that fire, by name."""
        found: dict[str, list[dict[str, Any]]] = {}
        for alert in self._get("alerts")["alerts"]:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert)
        return found

    def until(self, condition: Callable[[], Any], *, what: object, seconds: float = 60.0) -> None:
        """Waits until `condition` gives something true."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
            time.sleep(_POLL_SECONDS)  # polls HTTP; nothing to await

    def until_data(self, expression: str, count: int = 1) -> None:
        """Waits until the query has at least `count` series."""
        self.until(lambda: len(self.query(expression)) >= count, what=f"data for {expression}")

    def until_firing(self, name: str, **labels: str) -> str:
        """Waits until the alert fires with these labels; its description."""
        found: list[dict[str, Any]] = []

        def fires() -> bool:
            alerts = self.firing().get(name, [])
            found[:] = [each for each in alerts if labels.items() <= each["labels"].items()]
            return bool(found)

        self.until(fires, what=f"{name} {labels}", seconds=90)
        return str(found[0]["annotations"]["description"])

    def until_silent(self, *names: str) -> None:
        """Waits until none of the alerts fires."""
        self.until(lambda: not set(names) & set(self.firing()), what=f"the end of {names}", seconds=120)

    def is_ready(self) -> bool:
        """Whether it answers queries."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self._url}/-/ready", timeout=5):
            return True
        return False

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]


@contextlib.contextmanager
def running_prometheus(directory: Path) -> Iterator[Prometheus]:
    """A server that keeps what it needs in `directory`.

    It looks each second, its alerts fire at once instead of after their `for`, and consider 20 seconds
    instead of minutes.
    """
    directory.mkdir()
    config = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        del job["dns_sd_configs"]
        job["file_sd_configs"] = [{"files": [str(directory / f"{job['job_name']}.json")]}]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    rules = re.sub(r"^( +for: ).*$", r"\g<1>0s", (DEPLOYED / "alerts.yml").read_text(), flags=re.M)
    (directory / "alerts.yml").write_text(re.sub(r"\[[125]m\]", "[20s]", rules))
    port = free_port()
    server = Prometheus(directory, port)
    server.watch({})
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        server.until(server.is_ready, what=f"answer of Prometheus, see {directory / 'log'}")
        yield server
    finally:
        process.terminate()
        process.wait(30)
