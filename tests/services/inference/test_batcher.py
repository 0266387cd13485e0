from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.batcher import Batch, Batcher


def make(max_batch_size: int = 8, max_batch_delay: float = 1.0) -> Batcher[str]:
    return Batcher(max_batch_size=max_batch_size, max_batch_delay=max_batch_delay)


def keys(batch: Batch[str]) -> list[str]:
    return [entry.key for entry in batch.entries]


def test_nothing_leaves_when_nothing_waits() -> None:
    batcher = make()
    batcher.expect("a")
    assert not batcher.ready(100.0)
    assert batcher.deadline() is None


def test_a_full_batch_leaves_though_others_are_awaited() -> None:
    batcher = make(max_batch_size=8)
    for key in "abc":
        batcher.expect(key)
    batcher.add("a", 4, 0.0)
    assert not batcher.ready(0.5)
    batcher.add("b", 4, 0.5)
    assert batcher.is_full
    assert batcher.ready(0.5)


def test_a_batch_leaves_when_its_oldest_request_has_waited_long_enough() -> None:
    batcher = make(max_batch_delay=1.0)
    for key in "abc":
        batcher.expect(key)
    batcher.add("a", 1, 10.0)
    batcher.add("b", 1, 10.9)
    assert batcher.deadline() == 11.0
    assert not batcher.ready(10.99)
    assert batcher.ready(11.0)


def test_a_batch_leaves_as_soon_as_everyone_awaited_has_asked() -> None:
    batcher = make()
    batcher.expect("a")
    batcher.expect("b")
    batcher.add("a", 1, 0.0)
    assert not batcher.ready(0.0)
    batcher.add("b", 1, 0.001)
    assert batcher.ready(0.001)
    assert keys(batcher.take()) == ["a", "b"]


def test_who_was_not_answered_is_not_awaited() -> None:
    batcher = make()
    batcher.expect("a")
    batcher.add("a", 1, 0.0)
    batcher.take()  # its actions are withheld: no expect
    batcher.expect("b")
    batcher.add("b", 1, 0.0)
    assert batcher.ready(0.0)
    batcher.expect("a")  # now it is answered
    assert not batcher.ready(0.5)


def test_a_stream_that_died_is_not_awaited() -> None:
    batcher = make()
    batcher.expect("a")
    batcher.expect("dead")
    batcher.add("a", 1, 0.0)
    assert not batcher.ready(0.0)
    assert batcher.forget("dead") is None
    assert batcher.ready(0.0)


def test_a_group_larger_than_a_batch_goes_alone() -> None:
    batcher = make(max_batch_size=8)
    batcher.add("small", 2, 0.0)
    batcher.add("large", 20, 0.1)
    batcher.add("after", 1, 0.2)
    assert [keys(batcher.take()) for _ in range(3)] == [["small"], ["large"], ["after"]]


def test_a_request_that_does_not_fit_sends_the_batch_before_it_off() -> None:
    batcher = make(max_batch_size=8)
    batcher.expect("awaited")
    batcher.add("a", 6, 0.0)
    batcher.add("b", 3, 0.0)
    assert batcher.ready(0.0)
    assert keys(batcher.take()) == ["a"]
    assert not batcher.ready(0.0), "the rest waits for the awaited one"


def test_the_rows_behind_a_dead_stream_move_up() -> None:
    batcher = make(max_batch_size=8)
    for key in "abc":
        batcher.add(key, 2, 0.0)
    removed = batcher.forget("b")
    assert removed is not None
    batch, gone = removed
    assert (gone.offset, gone.rows, batch.rows) == (2, 2, 4)
    assert [(entry.key, entry.offset) for entry in batch.entries] == [("a", 0), ("c", 2)]
    assert batcher.take() is batch


def test_the_deadline_follows_the_oldest_request_that_still_waits() -> None:
    batcher = make(max_batch_delay=1.0)
    batcher.expect("awaited")
    batcher.add("a", 1, 0.0)
    batcher.add("b", 1, 0.7)
    batcher.forget("a")
    assert batcher.deadline() == 1.7
    batcher.forget("b")
    assert batcher.deadline() is None


@settings(max_examples=300)
@given(data=st.data(), max_batch_size=st.integers(1, 12))
def test_every_request_leaves_once_in_order_and_packed(data: st.DataObject, max_batch_size: int) -> None:
    batcher: Batcher[int] = Batcher(max_batch_size=max_batch_size, max_batch_delay=1.0)
    waiting: dict[int, int] = {}  # key -> rows, in order of arrival
    now, fresh, is_awaited = 0.0, 0, False
    for _ in range(data.draw(st.integers(1, 40))):
        now += data.draw(st.sampled_from([0.0, 0.3, 1.5]))
        action = data.draw(st.sampled_from(["add", "add", "forget", "take", "expect"]))
        if action == "add":
            waiting[fresh] = data.draw(st.integers(1, 15))
            batcher.add(fresh, waiting[fresh], now)
            fresh += 1
        elif action == "forget" and waiting:
            key = data.draw(st.sampled_from(list(waiting)))
            assert batcher.forget(key) is not None
            del waiting[key]
        elif action == "expect":
            batcher.expect(-1 - fresh)
            is_awaited = True  # for ever: it never asks
        elif action == "take" and waiting:
            if not is_awaited:
                assert batcher.ready(now)
            batch = batcher.take()
            taken = list(waiting)[: len(batch.entries)]
            assert [entry.key for entry in batch.entries] == taken
            offset = 0
            for entry in batch.entries:
                assert (entry.offset, entry.rows) == (offset, waiting.pop(entry.key))
                offset += entry.rows
            assert batch.rows == offset
            assert offset <= max_batch_size or len(batch.entries) == 1
        assert (batcher.deadline() is None) == (not waiting)
