"""Who may call: actors that bring the token; and where those are that may not."""

import hmac
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal
from urllib.parse import unquote

from services.inference.metrics import InferenceMetrics
from shared.telemetry import get_logger

Why = Literal["token", "tls", "plaintext"]

_SCHEME = "bearer "
_REMEMBERED = 1000

log = get_logger(__name__)


class Access:
    """Checks tokens; counts what is refused and logs it once per address and reason."""

    def __init__(self, tokens: Sequence[str], metrics: InferenceMetrics) -> None:
        """`tokens`: any of them will do; without any, all callers may call."""
        self._tokens = [token.encode() for token in tokens]
        self._metrics = metrics
        self._known: OrderedDict[tuple[str, Why], None] = OrderedDict()
        self.real_peer: Callable[[str], str] = lambda peer: peer  # behind TLS: whose connection that is

    def complaint(self, metadata: Iterable[tuple[str, str | bytes]], peer: str) -> str | None:
        """What to tell a caller without a token in the call's `metadata`; None for one that may call.

        `peer` is gRPC's name for who calls.
        """
        if not self._tokens:
            return None
        brought = next((value for key, value in metadata if key == "authorization"), "")
        text = brought.decode(errors="replace") if isinstance(brought, bytes) else brought
        token = text[len(_SCHEME) :].encode() if text.lower().startswith(_SCHEME) else b""
        if sum(hmac.compare_digest(token, each) for each in self._tokens):  # compares all: no time tells
            return None
        self.refused("token", host_of(self.real_peer(peer)), "a wrong token" if text else "no token")
        words = "the token is wrong" if text else "a token is wanted (authorization: Bearer …)"
        return f"{words}; see SEEDRL_INFERENCE_TOKEN"

    def refused(self, why: Why, address: str, reason: str) -> None:
        """Counts somebody at `address` who was refused; says so once."""
        self._metrics.refused_connections.labels(why).inc()
        if (address, why) in self._known:
            return
        self._known[address, why] = None
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        log.warning("connection refused", peer=address, reason=reason)


def host_of(peer: str) -> str:
    """The address in gRPC's `ipv4:1.2.3.4:567` or `ipv6:%5B::1%5D:567`, without the port."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else peer
