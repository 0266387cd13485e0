"""What a person watching a run sees; pure: statuses in, lines or a table out."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from services.learner.bottleneck import WAITS
from services.local.watching import ActorAccount

Status = Mapping[str, Any]

_MOST_ACTORS = 3  # that one line names


class Standstill:
    """For how long the steps of a run have not changed; the clock is passed in."""

    def __init__(self) -> None:
        self._steps: int | None = None
        self._since = 0.0

    def seconds(self, steps: int | None, now: float) -> float:
        """`steps`: None where nobody says them; `now`: monotonic seconds."""
        if steps is not None and steps != self._steps:
            self._steps, self._since = steps, now
        return 0.0 if self._steps is None else now - self._since


def headline(learner: Status, *, total_steps: int) -> str:
    """One line of the figures that matter, from the learner's status."""
    lag = (learner.get("policy_lag") or {}).get("p99")
    queued = (learner.get("chunks") or {}).get("queued")
    parts = [
        f"steps {learner.get('steps', 0):,}/{total_steps:,}",
        f"{learner.get('steps_per_second') or 0:,.0f} steps/s",
        f"updates {learner.get('updates', 0):,}",
        f"episodes {learner.get('episodes', 0):,}",
        _return(learner),
        f"lag p99 {lag}" if lag is not None else "lag –",
        f"queued {queued}" if queued is not None else "queued –",
    ]
    return "  ".join(parts)


def _return(learner: Status) -> str:
    returns = learner.get("mean_return_100")
    if returns is not None:
        return f"return {returns:.1f}"
    return "no episode has ended yet" if learner.get("updates") else "return –"


def bottleneck(learner: Status, *, figures: bool) -> str:
    """What holds the run up, from the learner's status: with its figures a sentence, without them a name.

    Whoever waits for something has no figures, but may have a reason, which is always said. Empty before the
    learner knows.
    """
    words = str(learner.get("bottleneck") or "")
    name = words.partition(": ")[0]
    return f"bottleneck: {words if figures or WAITS in name else name}" if words else ""


def progress_line(
    statuses: Mapping[str, Status], *, total_steps: int, trouble: Sequence[str], stands_still: bool = False
) -> str:
    """How the run comes on, and what it waits for before it trains and while it stands still, in one line.

    statuses: by service, those of inference, replay where there is one, and learner, in this order; empty
        where a service has said nothing since its start.
    trouble: what else there is to say.
    """
    learner = statuses["learner"]
    parts = []
    if learner.get("steps"):
        figures = headline(learner, total_steps=total_steps), bottleneck(learner, figures=False)
        parts.append("  ".join(part for part in figures if part))
    parts += trouble
    parts += [
        f"{name}: {doing(name, status)}"
        for name, status in statuses.items()
        if not learner.get("updates")
        or "silent_seconds" in status
        or (stands_still and status.get("waiting"))
    ]
    return "; ".join(parts)


def services_table(rows: Sequence[Mapping[str, object]], *, title: str) -> Table:
    """A row per service; the columns are those of the first."""
    table = Table(title=Text(title), title_justify="left", expand=False, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))  # which may hold an environment's words
    return table


def connected_actors(statuses: Mapping[str, Status]) -> Mapping[str, Status]:
    """By name, what inference sees of the actors that are connected to it."""
    return statuses["inference"].get("actors") or {}


def actor_doing(seen: Status | None, account: ActorAccount, now: float) -> str:
    """What an actor does: as inference sees it once it is connected, before that by its own account."""
    does = doing("actor", seen) if seen else account.doing(now)
    return "; ".join(part for part in (does, _crashes(account)) if part)


def actors_in_trouble(
    seen: Mapping[str, Status], accounts: Mapping[str, ActorAccount], now: float
) -> list[str]:
    """Of each actor that is not connected, or whose environments crash, what there is to say."""
    said = {
        name: _crashes(account) if name in seen else actor_doing(None, account, now)
        for name, account in accounts.items()
    }
    lines = [f"{name}: {words}" for name, words in said.items() if words]
    others = len(lines) - _MOST_ACTORS
    return lines if others <= 0 else [*lines[:_MOST_ACTORS], f"{others} more actors like that"]


def _crashes(account: ActorAccount) -> str:
    if not account.replaced:
        return ""
    return f"{account.replaced:,} crashed environments replaced, at last with {account.last_crash}"


def doing(service: str, status: Status) -> str:
    """What a service does or waits for, in words; `status` is empty before it has said anything."""
    if not status:
        return "starting"
    if silent := status.get("silent_seconds"):
        return f"has said nothing for {silent:.0f} s"
    waiting = status.get("waiting") or []
    if waiting:
        return "waiting for " + ", ".join(waiting)
    if service == "inference":
        actors = (status.get("actors") or {}).values()
        streams, environments = (sum(actor[key] for actor in actors) for key in ("groups", "environments"))
        speed = status.get("steps_per_second") or 0
        return f"{streams} streams, {environments} environments, {speed:,.0f} steps/s"
    if service == "actor":  # as inference sees it
        return f"{status['groups']} groups, {status['environments']} environments, {status['steps']:,} steps"
    if service == "replay":
        limiter = status.get("limiter")
        held_back = f"; {limiter}" if limiter not in (None, "free") else ""
        items, steps = status.get("items") or 0, status.get("steps") or 0
        return f"{items:,} sequences, {steps:,} steps received{held_back}"
    if service == "learner":
        figure = "entropy" if "entropy" in status else "td_error"
        return (
            f"{status.get('updates_per_second') or 0:,.1f} updates/s, "
            f"loss {_number(status.get('loss'))}, {figure} {_number(status.get(figure))}"
        )
    return ""


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"
