import asyncio
import subprocess
import sys
import time

import pytest
from nats.js.errors import KeyNotFoundError

from shared.bus import key_values
from shared.bus.connection import Bus
from shared.bus.key_values import (
    create_spec,
    held_lease,
    keep_paused,
    keep_spec,
    kept_paused,
    lease_owner,
    wait_for_spec,
)
from shared.bus.streams import run_bucket
from shared.errors import ConfigurationError, ConnectionFailed, Refused
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec
from tests.support.nats import NatsRun, OwnNats
from tests.support.waiting import eventually

TTL = 1.0


def spec(unroll: int = 20) -> RunSpec:
    leaf = LeafSpec(name="observation", dtype="float32", shape=(4,), low=(float("-inf"),), high=(1.0,))
    return RunSpec(
        environment=EnvironmentSpec(observation=(leaf,), num_actions=2),
        network=NetworkSpec(name="mlp"),
        agent="vtrace",
        unroll=unroll,
        reward_clip=0.0,
    )


async def hold(bus: Bus, owner: str, inside: asyncio.Event) -> None:
    """Holds the lease until it is cancelled or lost."""
    async with held_lease(bus, "learner", owner, ttl=TTL):
        inside.set()
        await asyncio.Event().wait()


async def test_the_first_spec_is_the_runs(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus() as other:
        assert await create_spec(bus, spec(20)) == spec(20)
        assert await create_spec(other, spec(40)) == spec(20)
        assert await wait_for_spec(other) == spec(20)


async def test_of_many_specs_at_once_all_get_the_same(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus() as other:
        got = await asyncio.gather(*(create_spec((bus, other)[i % 2], spec(i + 1)) for i in range(10)))
        assert len({one.unroll for one in got}) == 1


async def test_a_spec_is_waited_for_through_an_outage(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus, own_nats.bus() as other:
        waiting = asyncio.create_task(wait_for_spec(other))
        await own_nats.kill()
        creating = asyncio.create_task(create_spec(bus, spec()))
        await own_nats.start()
        assert await asyncio.wait_for(waiting, 15) == await creating == spec()


async def test_a_command_does_not_wait_for_a_spec_through_an_outage(own_nats: OwnNats) -> None:
    async with own_nats.bus(patient=False) as bus:
        await own_nats.stop()
        await eventually(lambda: not bus.is_connected)
        with pytest.raises(ConnectionFailed):
            await wait_for_spec(bus)


async def test_a_spec_of_another_format_is_refused(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await (await run_bucket(bus)).put("spec", b'{"format_version": 99}')
        with pytest.raises(ConfigurationError, match="format version 99"):
            await wait_for_spec(bus)
        with pytest.raises(ConfigurationError, match="format version 99"):
            await create_spec(bus, spec())


async def test_a_lost_spec_is_put_back_but_another_in_its_place_ends_who_keeps_it(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_values, "KEEP_SECONDS", 0.01)
    async with nats.bus() as bus, asyncio.timeout(30):
        keeping = asyncio.create_task(keep_spec(bus, spec(20)))
        assert await wait_for_spec(bus) == spec(20)
        bucket = await run_bucket(bus)
        await bucket.delete("spec")
        assert await wait_for_spec(bus) == spec(20)
        await bucket.put("spec", spec(40).to_json())
        with pytest.raises(ConfigurationError, match=r"begun anew with other settings .*unroll"):
            await keeping


async def test_two_runs_have_specs_of_their_own(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus(run_id=f"{nats.run_id}-2") as other:
        await create_spec(bus, spec(20))
        assert await create_spec(other, spec(40)) == spec(40)


async def test_a_run_is_paused_until_somebody_says_otherwise(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus() as other:
        assert not await kept_paused(other)
        for paused in (False, True, True, False, True):
            await keep_paused(bus, paused)
            assert await kept_paused(other) is paused


async def test_a_second_holder_is_refused_in_time_and_told_who_holds_the_lease(nats: NatsRun) -> None:
    owner = "learner on host a, pid 7"
    async with nats.bus() as bus, nats.bus() as other, held_lease(bus, "learner", owner, ttl=TTL):
        started = time.monotonic()
        with pytest.raises(Refused, match=f"'learner' of run {nats.run_id} is held by {owner}"):
            await asyncio.wait_for(hold(other, "b", asyncio.Event()), 10 * TTL)
        assert time.monotonic() - started < 5 * TTL


async def test_a_lease_is_kept_for_as_long_as_it_is_held(nats: NatsRun) -> None:
    """Longer than its time to live: somebody waits at the door all the time."""
    async with nats.bus() as bus, nats.bus() as other, held_lease(bus, "learner", "a", ttl=TTL):
        for _ in range(2):
            with pytest.raises(Refused):
                await hold(other, "b", asyncio.Event())


async def test_a_lease_that_was_given_up_is_free_at_once(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus() as other:
        for each in (bus, other, bus):
            started = time.monotonic()
            async with held_lease(each, "learner", "x", ttl=60):
                pass
            assert time.monotonic() - started < 10  # of 60


async def test_who_holds_a_lease_can_be_asked(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        assert await lease_owner(bus, "learner") is None
        async with held_lease(bus, "learner", "host-1"):
            assert await lease_owner(bus, "learner") == "host-1"
            assert await lease_owner(bus, "other") is None
        assert await lease_owner(bus, "learner") is None


async def test_the_lease_of_a_killed_holder_goes_to_the_next_in_time(nats: NatsRun) -> None:
    program = f"""
import asyncio
from shared.bus.key_values import held_lease
from tests.support.nats import NatsRun
async def main():
    async with {nats!r}.bus() as bus, held_lease(bus, "learner", "a", ttl={TTL}):
        print("held", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    holder = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"held\n"
    async with nats.bus() as heir:
        holder.kill()
        await holder.wait()
        started = time.monotonic()
        async with held_lease(heir, "learner", "b", ttl=TTL):
            assert time.monotonic() - started < 2 * TTL


async def revision(bus: Bus) -> int:
    """Of the lease's entry; 0 while there is none."""
    bucket = await bus.js.key_value(bus.subjects.leases_bucket)
    try:
        return (await bucket.get("learner")).revision or 0
    except KeyNotFoundError:
        return 0


async def test_a_holder_whose_connection_is_away_goes_on(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus, own_nats.bus() as other, held_lease(bus, "learner", "a", ttl=TTL):
        before = await revision(bus)
        await own_nats.stop()
        await asyncio.sleep(1.5 * TTL)  # longer than the entry lives
        await own_nats.start()
        await asyncio.gather(bus.connected(), other.connected())
        await eventually(lambda: is_renewed(other, before))
        with pytest.raises(Refused, match="held by a"):
            await hold(other, "b", asyncio.Event())


async def is_renewed(bus: Bus, before: int) -> bool:
    return await revision(bus) > before


async def test_a_holder_who_lost_the_lease_is_ended(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus, own_nats.bus() as other:
        inside = asyncio.Event()
        holding = asyncio.create_task(hold(bus, "a", inside))
        await inside.wait()
        bucket = await other.js.key_value(other.subjects.leases_bucket)
        await bucket.delete("learner")  # as if it had expired while the holder was away
        await bucket.create("learner", b'{"owner": "b", "holder": "another"}')
        with pytest.raises(Refused, match="was lost to b"):
            await asyncio.wait_for(holding, 5)


async def test_a_holder_who_stood_still_hears_that_the_lease_was_lost_before_it_goes_on(
    nats: NatsRun,
) -> None:
    now = 0.0

    async def stand_still(bus: Bus, other: Bus) -> None:
        nonlocal now
        async with held_lease(bus, "learner", "a", ttl=60.0, clock=lambda: now) as lease:
            bucket = await other.js.key_value(other.subjects.leases_bucket)
            await bucket.delete("learner")  # as if it had expired
            await bucket.create("learner", b'{"owner": "b", "holder": "another"}')
            now = 59.0
            await lease.confirmed()  # for so long nobody else could have had it
            now = 60.0
            await lease.confirmed()
            pytest.fail("it goes on")

    async with nats.bus() as bus, nats.bus() as other:
        with pytest.raises(Refused, match="was lost to b"):
            await stand_still(bus, other)


async def test_a_holder_who_stood_still_and_still_has_the_lease_goes_on(nats: NatsRun) -> None:
    now = 0.0
    async with (
        nats.bus() as bus,
        nats.bus() as other,
        held_lease(bus, "learner", "a", ttl=60.0, clock=lambda: now) as lease,
    ):
        for is_expired in (False, True):
            if is_expired:
                await (await other.js.key_value(other.subjects.leases_bucket)).delete("learner")
            now += 1000.0
            before = await revision(other)
            await lease.confirmed()
            renewed = await revision(other)
            assert renewed > before
            await lease.confirmed()
            assert await revision(other) == renewed  # known already


async def test_leases_of_other_names_and_runs_are_others(nats: NatsRun) -> None:
    async with (
        nats.bus() as bus,
        nats.bus(run_id=f"{nats.run_id}-2") as other,
        held_lease(bus, "learner", "a", ttl=TTL),
        held_lease(bus, "replay", "a", ttl=TTL),
        held_lease(other, "learner", "a", ttl=TTL),
    ):
        pass


async def test_an_exception_of_the_block_leaves_the_lease_as_it_is(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        with pytest.raises(KeyError):
            async with held_lease(bus, "learner", "a", ttl=TTL):
                raise KeyError


async def test_a_lease_may_be_taken_with_another_time_to_live(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        for ttl in (60.0, TTL):
            async with held_lease(bus, "learner", "a", ttl=ttl):
                bucket = await bus.js.key_value(bus.subjects.leases_bucket)
                assert (await bucket.status()).ttl == ttl
