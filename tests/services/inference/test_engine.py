import asyncio
import itertools
import threading
from typing import Any

import pytest

from services.inference.config import InferenceConfig
from services.inference.engine import Engine
from services.inference.metrics import InferenceMetrics
from services.inference.model_thread import ModelThread
from shared.bus.weights import Weights
from shared.checkpoints import weights_to_bytes
from shared.http import new_registry
from shared.networks.build import build_network
from tests.support.asker import Asker
from tests.support.counting import CountingNetwork
from tests.support.counting_group import counting_spec

SPEC = counting_spec()


async def test_a_batch_is_work_while_the_model_is_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()
    forward = CountingNetwork.forward

    def held(*arguments: Any) -> Any:
        began.set()
        assert go_on.wait(20)
        return forward(*arguments)

    async with ModelThread(beat=lambda: None) as thread:
        metrics = InferenceMetrics(new_registry())
        engine = await Engine.built(SPEC, InferenceConfig(device="cpu"), thread=thread, metrics=metrics)
        data = weights_to_bytes(build_network(SPEC).state_dict())
        await engine.load(Weights(version=1, update=9, network_hash=SPEC.network_hash, data=data))
        monkeypatch.setattr(CountingNetwork, "forward", held)
        asker = Asker(0, 2)
        answer = engine.dispatcher.ask(asker, asker.step())
        try:
            assert await asyncio.to_thread(began.wait, 20)
            first = metrics.model.seconds()
            assert 0.0 < first < metrics.model.seconds()
        finally:
            go_on.set()
        await answer
        assert metrics.model.seconds() == metrics.model.seconds() > first


async def test_a_quick_policy_goes_on_where_it_is_asked_and_gets_new_weights_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[str] = []
    forward = CountingNetwork.forward

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return forward(*arguments)

    monkeypatch.setattr(CountingNetwork, "forward", noted)
    for clock in ("perf_counter", "thread_time"):
        monkeypatch.setattr(f"services.inference.model.{clock}", itertools.count(0.0, 0.0001).__next__)
    async with ModelThread(beat=lambda: None) as thread:
        metrics = InferenceMetrics(new_registry())
        engine = await Engine.built(SPEC, InferenceConfig(device="cpu"), thread=thread, metrics=metrics)
        data = weights_to_bytes(build_network(SPEC).state_dict())
        threads.clear()
        asker = Asker(0, 2)
        versions: list[int] = []
        for version in (1, 2):
            await engine.load(Weights(version=version, update=9, network_hash=SPEC.network_hash, data=data))
            answers = [await engine.dispatcher.ask(asker, asker.step()) for _ in range(32)]
            versions += [answer.weights_version for answer in answers]
    assert threads == ["model"] * 32 + [threading.current_thread().name] * 32
    assert versions == [1] * 32 + [2] * 32
