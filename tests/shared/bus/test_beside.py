import asyncio

import pytest

from shared.bus.beside import beside


async def forever() -> None:
    await asyncio.Event().wait()


async def failing() -> None:
    raise KeyError("beside")


async def test_the_end_of_the_block_cancels_what_runs_beside() -> None:
    async with beside(forever()):
        pass
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_failure_beside_ends_the_block() -> None:
    with pytest.raises(KeyError, match="beside"):
        async with beside(forever(), failing()):
            await forever()


async def test_a_failure_beside_is_not_lost_when_the_block_is_over_already() -> None:
    with pytest.raises(KeyError, match="beside"):
        async with beside(failing()):
            await asyncio.sleep(0)  # it fails; the block ends by itself


async def test_an_exception_of_the_block_leaves_it_as_it_is() -> None:
    error = ValueError("the block's")
    with pytest.raises(ValueError, match="the block's") as caught:
        async with beside(forever()):
            raise error
    assert caught.value is error


async def test_a_group_of_exceptions_leaves_the_block_as_it_is() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with beside(forever()):
            raise ExceptionGroup("two", [ValueError("one"), ValueError("another")])
    assert caught.value.message == "two"


async def test_a_cancellation_from_outside_goes_through() -> None:
    async def block() -> None:
        async with beside(forever()):
            await forever()

    task = asyncio.create_task(block())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}
