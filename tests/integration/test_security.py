"""Tokens and TLS between real processes: who is let in, who is refused, and that no secret shows anywhere."""

import contextlib
import re
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from shared.addresses import free_port
from tests.support.certificates import Certificates, made_certificates
from tests.support.commands import command, environment, one_clear_line, seedrl
from tests.support.local_run import training
from tests.support.nats import NatsRun
from tests.support.processes import killed_at_last

TOKEN = "3f9c2-actors-token-51"
SECONDS = 60.0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return made_certificates(tmp_path_factory.mktemp("certificates"))


class Service:
    """A service as a process of its own, with its log."""

    def __init__(self, process: "subprocess.Popen[bytes]", http_port: int, log: Path) -> None:
        self.process = process
        self.http_port = http_port
        self.log = log

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def refused(self, reason: str) -> float:
        found = re.search(
            rf'^seedrl_inference_refused_connections_total{{reason="{reason}"}} (\S+)',
            self.get("metrics"),
            re.M,
        )
        assert found
        return float(found[1])

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(OSError):
                if is_so():
                    return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"no {what}: {self.log.read_text()}"
            time.sleep(0.05)

    def complaints(self) -> list[dict[str, str]]:
        lines = [orjson.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == "connection refused"]


@contextlib.contextmanager
def running(name: str, *words: str, cwd: Path, **settings: str) -> Iterator[Service]:
    port, log = free_port(), cwd / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(name, *words, "--http-port", str(port), "--log-format", "json"),
            cwd=cwd,
            env=environment(**settings),
            stdout=output,
            stderr=output,
        )
    try:
        yield Service(process, port, log)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running_inference(nats: NatsRun, cwd: Path, **settings: str) -> Iterator[tuple[Service, tuple[str, ...]]]:
    """Inference, and what an actor has to say to reach it."""
    port = free_port()
    words = ("--run-id", nats.run_id, "--nats-url", nats.url, "--port", str(port), "--preset", "cartpole")
    with running("inference", *words, cwd=cwd, SEEDRL_NATS_TOKEN=nats.token, **settings) as inference:
        inference.until(lambda: "reasons" in inference.get("readyz"), "readiness")
        yield inference, ("CartPole-v1", "--run-id", nats.run_id, "--inference-url", f"127.0.0.1:{port}")


def test_actors_must_bring_the_token(nats: NatsRun, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{TOKEN}\nan-older-one\n")
    with running_inference(nats, tmp_path, SEEDRL_INFERENCE_TOKEN_FILE=str(tokens)) as (inference, to):
        for token in (TOKEN, "an-older-one"):
            with running("actor", *to, cwd=tmp_path, SEEDRL_INFERENCE_TOKEN=token):
                inference.until(lambda: '"rows"' in inference.get("status"), "stream")
            inference.until(lambda: '"rows"' not in inference.get("status"), "end of the stream")
        assert inference.refused("token") == 0
        for settings in ({"SEEDRL_INFERENCE_TOKEN": "wrong"}, {}, {"SEEDRL_INFERENCE_TOKEN": "wrong"}):
            result = seedrl("actor", *to, cwd=tmp_path, settings=settings)
            assert result.returncode == 4
            assert "UNAUTHENTICATED" in one_clear_line(result)
            assert ("is wrong" if settings else "is wanted") in result.stderr
        assert inference.refused("token") >= 3  # for each group of an actor
        assert [line["peer"] for line in inference.complaints()] == ["127.0.0.1"]
        assert TOKEN not in inference.log.read_text()


def test_with_tls_others_are_refused_counted_and_named_once(
    nats: NatsRun, tmp_path: Path, certificates: Certificates
) -> None:
    tls = {
        "SEEDRL_TLS_CERT": str(certificates.cert),
        "SEEDRL_TLS_KEY": str(certificates.key),
        "SEEDRL_INFERENCE_TOKEN": TOKEN,
    }
    with running_inference(nats, tmp_path, **tls) as (inference, to):
        mine = {"SEEDRL_INFERENCE_TOKEN": TOKEN, "SEEDRL_TLS_CA": str(certificates.ca)}
        with running("actor", *to, cwd=tmp_path, **mine):
            inference.until(lambda: '"rows"' in inference.get("status"), "stream over TLS")

            wrong_ca = seedrl(
                "actor", *to, cwd=tmp_path, settings={**mine, "SEEDRL_TLS_CA": str(certificates.other_ca)}
            )
            assert wrong_ca.returncode == 4
            assert "CERTIFICATE_VERIFY_FAILED" in one_clear_line(wrong_ca)
            inference.until(
                lambda: inference.refused("tls") >= 1, "refusal of a client that believes another"
            )

            wrong_token = seedrl(
                "actor", *to, cwd=tmp_path, settings={**mine, "SEEDRL_INFERENCE_TOKEN": "wrong"}
            )
            assert wrong_token.returncode == 4
            assert inference.refused("token") >= 1

            host, _, port = to[-1].rpartition(":")
            for _ in range(3):
                with socket.create_connection((host, int(port))) as plain:
                    plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64))
                    plain.settimeout(SECONDS)
                    with contextlib.suppress(ConnectionResetError):
                        while plain.recv(4096):
                            pass
            inference.until(lambda: inference.refused("plaintext") >= 3, "refusal of plain text")
            with running("actor", *to, cwd=tmp_path / "..", SEEDRL_INFERENCE_TOKEN=TOKEN) as plain_actor:
                inference.until(lambda: inference.refused("plaintext") >= 4, "refusal of a plain actor")
                plain_actor.until(lambda: "perhaps it speaks TLS" in plain_actor.get("status"), "its words")
            assert '"rows"' in inference.get("status")  # the good one plays on
        complaints = [(line["peer"], line["reason"].partition(":")[0]) for line in inference.complaints()]
        assert sorted(complaints) == [
            ("127.0.0.1", "TLS handshake"),  # its certificate was not believed
            ("127.0.0.1", "a wrong token"),
            ("127.0.0.1", "no TLS, which is needed here"),
        ]


def test_a_certificate_for_another_host_name_ends_the_actor(
    nats: NatsRun, tmp_path: Path, certificates: Certificates
) -> None:
    tls = {"SEEDRL_TLS_CERT": str(certificates.elsewhere), "SEEDRL_TLS_KEY": str(certificates.key)}
    with running_inference(nats, tmp_path, **tls) as (_, to):
        result = seedrl("actor", *to, cwd=tmp_path, settings={"SEEDRL_TLS_CA": str(certificates.ca)})
    assert result.returncode == 4
    assert "Hostname Verification Check failed" in one_clear_line(result)


def test_an_actor_says_that_inference_speaks_no_tls(
    nats: NatsRun, tmp_path: Path, certificates: Certificates
) -> None:
    with (
        running_inference(nats, tmp_path) as (_, to),
        running("actor", *to, cwd=tmp_path, SEEDRL_TLS_CA=str(certificates.ca)) as actor,
    ):
        actor.until(lambda: "it speaks no TLS, which --tls-ca asks for" in actor.get("status"), "its words")


def test_a_token_in_the_address_of_nats_serves_a_local_run_and_is_in_no_file_that_stays(
    nats: NatsRun, tmp_path: Path
) -> None:
    url = nats.url.replace("//", f"//{nats.token}@")
    words = ("CartPole-v1", "--preset", "cartpole", "--total-steps", "1e3", "--run-dir", "run")
    result = seedrl("train", *words, cwd=tmp_path, settings={"SEEDRL_NATS_URL": url})
    assert result.returncode == 0, result.stderr
    held = [
        path for path in tmp_path.rglob("*") if path.is_file() and nats.token.encode() in path.read_bytes()
    ]
    assert not held
    assert nats.token not in result.stdout + result.stderr


@pytest.mark.parametrize("missing", ["tls_cert", "tls_key", "tls_ca", "nats_ca"])
def test_files_that_cannot_be_used_are_named(
    missing: str, tmp_path: Path, certificates: Certificates
) -> None:
    settings = {
        "SEEDRL_TLS_CERT": str(certificates.cert),
        "SEEDRL_TLS_KEY": str(certificates.key),
        "SEEDRL_TLS_CA": str(certificates.ca),
        "SEEDRL_NATS_CA": str(certificates.ca),
        f"SEEDRL_{missing.upper()}": str(tmp_path / "nothing.pem"),
    }
    words = ("actor", "CartPole-v1") if missing == "tls_ca" else ("inference", "--port", "0")
    result = seedrl(*words, cwd=tmp_path, settings=settings)
    assert f"{missing}: cannot read {tmp_path}/nothing.pem" in one_clear_line(result)


@pytest.fixture(params=[True, False], ids=["tls", "plain"])
def own_nats(
    request: pytest.FixtureRequest, tmp_path: Path, certificates: Certificates
) -> Iterator[tuple[str, Path, bool]]:
    """URL and log of a server that wants a token, with TLS or without."""
    port, log = free_port(), tmp_path / "nats.log"
    tls = (
        f'tls {{ cert_file: "{certificates.cert}", key_file: "{certificates.key}" }}' if request.param else ""
    )
    config = tmp_path / "nats.conf"
    config.write_text(
        f'listen: "127.0.0.1:{port}"\nauthorization {{ token: "nats-secret" }}\n{tls}\n'
        f'jetstream {{ store_dir: "{tmp_path}/store" }}\n'
    )
    nats_server = Path(command("x")[0]).with_name("nats-server")
    with log.open("wb") as output:
        process = subprocess.Popen([str(nats_server), "--config", str(config)], stdout=output, stderr=output)
    with killed_at_last(process):
        deadline = time.monotonic() + SECONDS
        while "Server is ready" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"nats://127.0.0.1:{port}", log, request.param


def test_nats_is_spoken_to_over_tls_or_not_at_all(
    own_nats: tuple[str, Path, bool], tmp_path: Path, certificates: Certificates
) -> None:
    url, log, has_tls = own_nats
    secret = tmp_path / "token"
    secret.write_text("nats-secret\n")
    words = (
        "learner",
        "--run-id",
        "tls",
        "--nats-url",
        url,
        "--preset",
        "cartpole",
        "--run-dir",
        str(tmp_path),
    )
    mine = {"SEEDRL_NATS_TOKEN_FILE": str(secret), "SEEDRL_NATS_CA": str(certificates.ca)}
    if not has_tls:
        refused = seedrl(*words, cwd=tmp_path, settings=mine)
        assert refused.returncode == 4
        assert "it speaks no TLS" in one_clear_line(refused)
        return
    with running(*words, cwd=tmp_path, **mine) as learner:
        learner.until(lambda: "first actor" in learner.get("status"), "connection over TLS")
        asked = seedrl("status", "--run-id", "tls", "--nats-url", url, cwd=tmp_path, settings=mine)
        assert (asked.returncode, asked.stderr) == (0, "")
    levels = {orjson.loads(line)["level"] for line in learner.log.read_text().splitlines()}
    assert levels == {"info"}, learner.log.read_text()
    stranger = seedrl(*words, cwd=tmp_path, settings={**mine, "SEEDRL_NATS_CA": str(certificates.other_ca)})
    assert stranger.returncode == 4
    assert "the certificate of NATS" in one_clear_line(stranger)
    secret.write_text("wrong\n")
    wrong = seedrl(*words, cwd=tmp_path, settings=mine)
    assert wrong.returncode == 4
    assert "refuses the token" in one_clear_line(wrong)
    assert re.search(
        r"127\.0\.0\.1:\d+ .*authentication error", log.read_text()
    )  # the server names who it was


def test_a_runs_secrets_show_nowhere_and_it_listens_on_this_machine_only(
    tmp_path: Path, certificates: Certificates
) -> None:
    settings = {
        "SEEDRL_INFERENCE_TOKEN": TOKEN,
        "SEEDRL_TLS_CERT": str(certificates.cert),
        "SEEDRL_TLS_KEY": str(certificates.key),
        "SEEDRL_TLS_CA": str(certificates.ca),
    }
    directory = tmp_path / "run"
    with training(
        "CartPole-v1", "--preset", "cartpole", directory=directory, cwd=tmp_path, **settings
    ) as run:
        run.until_steps(5000)
        secrets = (TOKEN, run.connection()["nats_token"])
        pids = [run.process.pid, *_descendants(run.process.pid)]
        assert len(pids) >= 5
        shown = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
        for log in (directory / "logs").iterdir():
            address = re.findall(r'"event":"http".*?"address":"([^"]+)"', log.read_text()) or re.findall(
                r'"address":"([^"]+)".*?"event":"http"', log.read_text()
            )
            for path in ("healthz", "readyz", "metrics", "status") if address else ():
                with urllib.request.urlopen(f"http://{address[-1]}/{path}", timeout=5) as answer:
                    shown.append(answer.read().decode())
        assert len(shown) >= len(pids) + 12
        inodes = {inode for pid in pids for inode in _sockets(pid)}
        listening = {local for local, inode in _listening() if inode in inodes}
        assert listening
        assert all(local in ("0100007F", "00000000000000000000000001000000") for local in listening), (
            listening
        )
        run.end()
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != "nats-server.conf"]
    shown += [file.read_bytes().decode(errors="replace") for file in files]
    # Which is its owner's alone.
    assert (directory / "nats/nats-server.conf").stat().st_mode & 0o077 == 0
    for text in shown:
        assert not any(secret in text for secret in secrets)


def test_the_actor_that_a_run_with_tls_proposes_gets_to_it(
    tmp_path: Path, certificates: Certificates
) -> None:
    tls = {"SEEDRL_TLS_CERT": str(certificates.cert), "SEEDRL_TLS_KEY": str(certificates.key)}
    trusted = tmp_path / "whom to trust.pem"
    trusted.write_bytes(certificates.ca.read_bytes())
    words = ("CartPole-v1", "--preset", "cartpole", "--tls-ca", str(trusted), "--host", "0.0.0.0")
    directory = tmp_path / "run"
    with training(*words, directory=directory, cwd=tmp_path, **tls) as run:
        said = shlex.split(run.until_said("another actor: seedrl actor").partition("seedrl actor ")[2])
        assert "with copies of both files and --inference-url" in run.until_said("on another host: the same")
        run.until_steps(1000)
        with running("actor", *said, cwd=tmp_path) as actor:
            actor.until(lambda: actor.get("readyz") != "", "stream to inference")
        run.end()


def _descendants(pid: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    found, todo = list[int](), [pid]
    while todo:
        some = [child for child, parent in parents.items() if parent == todo[-1]]
        todo.pop()
        found += some
        todo += some
    return found


def _sockets(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if (target := str(link.readlink())).startswith("socket:["):
                    yield target[8:-1]


def _listening() -> Iterator[tuple[str, str]]:
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                yield words[1].partition(":")[0], words[9]
