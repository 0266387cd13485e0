"""What docs/formats.md shows is true: its names, its fields, and its reader, which is run against NATS."""

import asyncio
import re
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

import pytest

from shared.bus.work_queue import ensure_queue, publish_chunk
from shared.specs import Agent
from shared.subjects import ControlVerb, Subjects
from shared.types import Chunk
from shared.wire.chunks import encode_chunk
from tests.support.chunks import arrays_of, image_chunk, make_chunk, make_run_spec
from tests.support.commands import ROOT
from tests.support.nats import NatsRun
from tests.support.waiting import eventually

DOCUMENT = (ROOT / "docs/formats.md").read_text()
AGENTS: tuple[Agent, ...] = get_args(Agent)


@pytest.fixture
def reader() -> dict[str, Any]:
    """The documented program's functions."""
    found = re.search(r"^```python reader\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found is not None
    source: dict[str, Any] = {"__name__": "reader"}
    exec(found[1], source)
    return source


def noise(agent: Agent) -> Chunk:
    spec = make_run_spec([("a", "float32", (3,)), ("b", "int16", ())], frame_stack=2, agent=agent)
    return make_chunk(spec, [((8,), "float32")])


@pytest.mark.parametrize("chunk", [image_chunk(), *map(noise, AGENTS)], ids=["compressed", *AGENTS])
def test_the_reader_reads_what_is_published(reader: dict[str, Any], chunk: Chunk) -> None:
    meta, arrays = reader["read_chunk"](encode_chunk(chunk))
    assert meta == vars(chunk.header)
    expected = arrays_of(chunk)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        assert arrays[name].tobytes() == array.tobytes()


def test_every_field_is_in_the_table() -> None:
    shown = re.findall(r"^\| (`[a-z][^|]*) \| [^|]*\[[RT]", DOCUMENT, re.MULTILINE)
    named = {name for names in shown for name in re.findall(r"`([^`]+)`", names)}
    fields = {name for agent in AGENTS for name in arrays_of(noise(agent))}
    assert {name.partition("/")[0] for name in named} == {name.partition("/")[0] for name in fields}


def test_the_names_are_those_of_the_code() -> None:
    subjects = Subjects("RUN")
    names = [name for name, value in vars(Subjects).items() if isinstance(value, property)]
    spelled = {str(getattr(subjects, name)) for name in names} - {subjects.prefix, subjects.weights}
    spelled |= {"seedrl.RUN.control.VERB", subjects.status("SERVICE", "ID"), subjects.weights_part(0)}
    abbreviated = {subjects.replay_priorities, subjects.replay_snapshot}
    assert {f"`{name}`" in DOCUMENT for name in spelled - abbreviated} == {True}
    assert all(f"`{verb}`" in DOCUMENT for verb in get_args(ControlVerb))


async def test_the_reader_watches_a_run(
    reader: dict[str, Any], nats: NatsRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes nothing away, and says once what is sent twice."""
    async with nats.bus() as bus:
        await ensure_queue(bus, 100)
        watching = asyncio.create_task(reader["watch"](nats.url, nats.token, nats.run_id))
        shown = ""

        async def has_shown(number: int) -> bool:
            nonlocal shown
            chunk = image_chunk()
            data = encode_chunk(replace(chunk, header=replace(chunk.header, number=number)))
            await publish_chunk(bus, data, f"stream-1/{number}/0")
            shown += capsys.readouterr().out
            return f"chunk {number} " in shown

        await eventually(lambda: has_shown(7))
        await has_shown(7)
        await eventually(lambda: has_shown(8))
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        info = await bus.js.stream_info(bus.subjects.trajectories_stream)
        assert info.state.messages == 2
    assert shown.count("chunk 7 ") == shown.count("chunk 8 ") == 1
    assert shown.startswith("host-1 chunk 7 rows 0–3: 24 steps, reward 0, weights of update 0\n")
