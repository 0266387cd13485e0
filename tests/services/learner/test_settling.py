"""The order of counting, journal and acknowledgement."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.learner.accounts import Accounts, load_accounts
from services.learner.rows import Outcome
from services.learner.settling import Bookkeeper
from shared.bus.beside import beside
from shared.errors import Refused, RunError
from tests.support.waiting import eventually


class FakeMessage:
    """A message of the work queue that notes what is done to it."""

    def __init__(
        self,
        sequence: int,
        *,
        redelivered: bool = False,
        on_ack: Callable[[], object] = lambda: None,
        kept_at: datetime = datetime(2026, 1, 1, tzinfo=UTC),
    ) -> None:
        self.sequence = sequence
        self.kept_at = kept_at
        self.redelivered = redelivered
        self.acks = self.in_progresses = self.naks = 0
        self.may_ack = asyncio.Event()
        self.may_ack.set()
        self._on_ack = on_ack

    async def ack(self) -> None:
        self._on_ack()
        await self.may_ack.wait()
        self.acks += 1

    async def in_progress(self) -> None:
        self.in_progresses += 1

    async def nak(self) -> None:
        self.naks += 1


class FakeLease:
    """One that is held until it is lost."""

    def __init__(self) -> None:
        self.is_lost = False

    @property
    def is_certain(self) -> bool:
        return not self.is_lost

    async def confirmed(self) -> None:
        if self.is_lost:
            raise Refused("lost")

    def lose(self) -> None:
        self.is_lost = True


@pytest.fixture
def lease() -> FakeLease:
    return FakeLease()


@pytest.fixture
async def books(tmp_path: Path, lease: FakeLease) -> AsyncIterator[Bookkeeper]:
    with ThreadPoolExecutor(1) as executor:
        yield Bookkeeper(Accounts(), tmp_path, executor, claim=lease)


@asynccontextmanager
async def running(books: Bookkeeper) -> AsyncIterator[None]:
    async with asyncio.timeout(10), beside(books.run()):
        yield


def hold(books: Bookkeeper, message: FakeMessage) -> bool:
    return books.hold(message)  # type: ignore[arg-type]


async def test_the_journal_names_a_message_before_it_is_acknowledged(
    books: Bookkeeper, tmp_path: Path
) -> None:
    journals = []
    message = FakeMessage(7, on_ack=lambda: journals.append(load_accounts(tmp_path)))
    hold(books, message)
    books.count([Outcome(7, None, steps=3, lag=1)], updates=1)
    async with running(books):
        await books.settled()
    (journal,) = journals
    assert (journal.trained, journal.steps, journal.updates) == (1, 3, 1)
    assert list(journal.pending) == [7]
    assert (message.acks, books.held, books.accounts.pending) == (1, 0, {})


@pytest.mark.parametrize("lost", ["before the journal", "while it is written"])
async def test_without_the_lease_nothing_is_settled(
    books: Bookkeeper, lease: FakeLease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    message = FakeMessage(7)
    hold(books, message)
    books.count([Outcome(7, None)], updates=1)
    if lost == "before the journal":
        lease.lose()
    else:
        write = books.write

        async def written() -> None:
            await write()
            lease.lose()

        monkeypatch.setattr(books, "write", written)
    with pytest.raises(Refused, match="lost"):
        async with running(books):
            await books.settled()
    assert message.acks == 0
    assert (tmp_path / "accounts.json").exists() is (lost == "while it is written")


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_checkpoint_says_no_more_steps_than_the_journal(
    books: Bookkeeper, lease: FakeLease, tmp_path: Path, is_lost: bool
) -> None:
    await books.write()
    hold(books, FakeMessage(7))
    books.count([Outcome(7, None, steps=3)], updates=1)
    if is_lost:
        lease.lose()  # a successor may have written the journal
    assert await books.steps_for_checkpoint() == load_accounts(tmp_path).steps == (0 if is_lost else 3)


async def test_what_was_acknowledged_leaves_the_next_journal(books: Bookkeeper, tmp_path: Path) -> None:
    hold(books, FakeMessage(7))
    books.count([Outcome(7, None)], updates=1)
    async with running(books):
        await books.settled()
        books.write_soon()
        await books.settled()
    assert load_accounts(tmp_path).pending == {}


async def test_weights_may_be_published_as_soon_as_the_journal_knows_their_update(books: Bookkeeper) -> None:
    message = FakeMessage(1)
    message.may_ack.clear()
    hold(books, message)
    books.count([Outcome(1, None)], updates=5)
    async with running(books):
        await books.journaled(5)
        assert message.acks == 0
        later = asyncio.ensure_future(books.journaled(6))
        settled = asyncio.ensure_future(books.settled())
        message.may_ack.set()
        await settled
        assert not later.done()
        books.count([], updates=6)
        await later


async def test_what_is_counted_during_an_acknowledgement_is_settled_after_it(books: Bookkeeper) -> None:
    first, second = FakeMessage(1), FakeMessage(2)
    first.may_ack.clear()
    hold(books, first)
    hold(books, second)
    books.count([Outcome(1, None)], updates=1)
    async with running(books):
        await books.journaled(1)
        books.count([Outcome(2, "lag")], updates=2)
        first.may_ack.set()
        await books.settled()
    assert (first.acks, second.acks, books.held) == (1, 1, 0)


async def test_a_message_that_comes_again_though_it_was_acknowledged_is_not_counted_again(
    books: Bookkeeper,
) -> None:
    assert hold(books, FakeMessage(1))
    async with running(books):
        books.count([Outcome(1, None, steps=4)], updates=1)
        await books.settled()
        again = FakeMessage(1, redelivered=True)
        assert not hold(books, again)
        await books.settled()
    assert again.acks == 1
    assert (books.accounts.trained, books.accounts.steps, books.accounts.redelivered) == (1, 4, 0)


async def test_another_message_of_a_number_that_was_acknowledged_is_counted(books: Bookkeeper) -> None:
    """NATS lost its store, so numbers begin at 1 again."""
    hold(books, FakeMessage(1))
    async with running(books):
        books.count([Outcome(1, None, steps=4)], updates=1)
        await books.settled()
        other = FakeMessage(1, redelivered=True, kept_at=datetime(2026, 1, 2, tzinfo=UTC))
        assert hold(books, other)
        assert other.acks == 0
        books.count([Outcome(1, None, steps=4)], updates=2)
        await books.settled()
    assert (other.acks, books.accounts.trained, books.accounts.steps) == (1, 2, 8)


async def test_a_redelivered_message_is_counted_as_such(books: Bookkeeper) -> None:
    assert hold(books, FakeMessage(1, redelivered=True))
    books.count([Outcome(1, None)], updates=1)
    assert books.accounts.redelivered == 1


async def test_messages_in_hand_are_kept_alive(books: Bookkeeper) -> None:
    message = FakeMessage(1)
    hold(books, message)
    async with asyncio.timeout(10), beside(books.keep_alive(0.001)):
        await eventually(lambda: message.in_progresses >= 3)


async def test_closing_gives_back_what_was_not_counted(books: Bookkeeper, tmp_path: Path) -> None:
    counted, held = FakeMessage(1), FakeMessage(2)
    hold(books, counted)
    hold(books, held)
    books.count([Outcome(1, None)], updates=1)
    await books.close()
    assert (counted.naks, held.naks) == (0, 1)
    assert list(load_accounts(tmp_path).pending) == [1]


async def test_closing_gives_them_back_also_without_a_journal(books: Bookkeeper, tmp_path: Path) -> None:
    (tmp_path / "accounts.tmp").mkdir()  # in the way of what is written
    held = FakeMessage(1)
    hold(books, held)
    with pytest.raises(RunError, match="cannot write the accounts"):
        await books.close()
    assert held.naks == 1


async def test_a_journal_that_cannot_be_written_is_tried_again_and_nothing_acknowledged_meanwhile(
    books: Bookkeeper, tmp_path: Path
) -> None:
    (tmp_path / "accounts.tmp").mkdir()  # in the way of what is written
    message = FakeMessage(7)
    hold(books, message)
    books.count([Outcome(7, None, steps=3)], updates=1)
    async with running(books):
        await eventually(lambda: "cannot write the accounts" in books.trouble)
        assert (message.acks, books.held) == (0, 1)
        (tmp_path / "accounts.tmp").rmdir()
        await books.settled()
    assert (message.acks, books.held, books.trouble) == (1, 0, "")
    assert load_accounts(tmp_path).trained == 1
