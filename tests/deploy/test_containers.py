"""What compose.yaml and its neighbours say agrees with the code; without an engine."""

import re
from pathlib import Path

import yaml

from services.cli import known_settings
from services.nats_server import MAX_PAYLOAD_BYTES
from shared.presets import read_preset

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def test_every_setting_that_containers_get_is_one() -> None:
    known = {f"SEEDRL_{name.upper()}" for model in known_settings() for name in model.model_fields}
    given = {name for service in SERVICES.values() for name in service.get("environment", {})}
    assert {name for name in given if name.startswith("SEEDRL_")} <= known
    assert "SEEDRL_NATS_TOKEN" not in SERVICES["actor"]["environment"]


def test_the_example_explains_every_variable_and_no_other() -> None:
    used = set(
        re.findall(
            r"\$\{(\w+)", (ROOT / "compose.yaml").read_text() + (ROOT / "compose.gpu.yaml").read_text()
        )
    )
    used |= {name for name, value in COMPOSE["x-run"].items() if value is None}
    explained = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.M))
    assert explained == used


def test_what_the_example_leaves_alone_holds_with_its_preset() -> None:
    text = (ROOT / ".env.example").read_text()
    (preset,) = re.findall(r"^SEEDRL_PRESET=(\w+)$", text, re.M)
    defaults = {
        name: field.default for model in known_settings() for name, field in model.model_fields.items()
    }
    holds = {**defaults, **read_preset(preset).values, "env_kwargs": {}}
    examples = {"seed", "max_seconds", "tag"}
    for name, value in re.findall(r"^#SEEDRL_(\w+)=(.*)$", text, re.M):
        in_compose = re.fullmatch(r"\$\{\w+:-(.*)\}", COMPOSE["x-run"].get(f"SEEDRL_{name}") or "")
        expected = yaml.safe_load(in_compose[1]) if in_compose else holds.get(name.lower())
        assert name.lower() in examples or yaml.safe_load(value) == expected, name


def test_every_image_has_its_target() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "Dockerfile").read_text(), re.M))
    built = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert {"inference", "learner", "replay", "tensorboard", "${ACTOR_TARGET:-actor}"} == built
    assert {*built - {"${ACTOR_TARGET:-actor}"}, "actor", "actor-envpool"} <= targets


def test_only_http_is_published_and_on_loopback_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not any(port.endswith((":50051", ":4222", ":8222")) for port in ports)


def test_nats_takes_messages_as_large_as_on_one_machine() -> None:
    config = (ROOT / "deploy/nats/nats-server.conf").read_text()
    assert f"max_payload: {MAX_PAYLOAD_BYTES}\n" in re.sub(r" +#.*", "", config)


def test_both_generations_of_compose_can_read_it() -> None:
    assert not {"name", "version", "include"} & COMPOSE.keys()
    assert "# syntax" not in (ROOT / "Dockerfile").read_text()
    assert "--mount" not in (ROOT / "Dockerfile").read_text()
