import asyncio
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.inference.service import run
from shared.errors import ConfigurationError
from tests.support.counting_group import CountingGroup
from tests.support.inference_service import inference_config, running_inference
from tests.support.nats import NatsRun, OwnNats
from tests.support.waiting import eventually

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_grpc_health_says_whether_hello_is_accepted(own_nats: OwnNats) -> None:
    await own_nats.stop()
    async with running_inference(own_nats.run, wait=False) as service:
        stub = health_pb2_grpc.HealthStub(service.channel)

        async def status(name: str) -> int:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            return int(answer.status)

        for name in ("", "seedrl.v1.Inference"):

            async def is_not_serving(name: str = name) -> bool:
                return await status(name) == NOT_SERVING

            await eventually(is_not_serving)
        await own_nats.start()

        async def is_serving() -> bool:
            return {await status(""), await status("seedrl.v1.Inference")} == {SERVING}

        await eventually(is_serving)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        service.stop.set()
        assert (await watch.read()).status == NOT_SERVING


async def test_reflection_tells_which_services_there_are(nats: NatsRun) -> None:
    async with running_inference(nats) as service:
        stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        assert {each.name for each in answer.list_services_response.service} == {
            "seedrl.v1.Inference",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="seedrl.v1.Hello")
        await call.write(symbol)
        assert (await call.read()).file_descriptor_response.file_descriptor_proto
        call.cancel()


async def test_a_port_in_use_ends_the_service_naming_the_address(nats: NatsRun) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{port}: Address already in use"):
            await asyncio.wait_for(run(inference_config(nats, port=port), stop=asyncio.Event()), 10)


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
async def test_an_address_of_another_machine_ends_the_service(nats: NatsRun, host: str) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot listen on {host}:1234"):
        await asyncio.wait_for(run(inference_config(nats, host=host, port=1234), stop=asyncio.Event()), 10)


async def test_two_services_do_not_share_a_port(nats: NatsRun) -> None:
    async with running_inference(nats) as service:
        config = inference_config(nats, port=service.config.port)
        with pytest.raises(ConfigurationError, match="in use"):
            await asyncio.wait_for(run(config, stop=asyncio.Event()), 10)


async def test_the_generated_stub_speaks_with_the_service(nats: NatsRun) -> None:
    from shared.wire import inference_pb2 as pb
    from shared.wire.inference_pb2_grpc import InferenceStub

    async with running_inference(nats) as service:
        call = InferenceStub(service.channel).Act()  # type: ignore[call-arg]
        await call.write(pb.ActRequest.FromString(CountingGroup(1).hello(run_id=nats.run_id)))
        response = await call.read()
        assert response.welcome.run_id == nats.run_id
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK
