"""Hosts of one's own on one machine: network namespaces with addresses, joined by a bridge (Linux, root)."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_DROP = ("INPUT", "-w", "-j", "DROP", "-s")


def why_impossible() -> str:
    """Why there can be no such hosts here; "" when there can."""
    if os.name != "posix" or not Path("/proc/self/ns/net").exists():
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "iptables") if shutil.which(program) is None]
    if missing:
        return f"needs {' and '.join(missing)} (Debian: apt-get install iproute2 iptables)"
    try:
        with hosts("probe"):
            pass
    except subprocess.CalledProcessError as error:
        return f"this kernel or container refuses {' '.join(error.cmd)}: {error.stderr.strip()}"
    return ""


class Host:
    """A namespace with an address of its own."""

    def __init__(self, namespace: str, address: str) -> None:
        self.namespace = namespace
        self.address = address
        self._inside = ThreadPoolExecutor(1, initializer=self._enter)

    def command(self, words: list[str]) -> list[str]:
        """The command line that runs `words` on this host; the process is that of `words` itself."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def inside(self, function: Callable[[], T]) -> T:
        """What `function` returns when it opens its sockets on this host; it runs in another thread."""
        return self._inside.submit(function).result()

    def close(self) -> None:
        self._inside.shutdown()

    def drop(self, other: "Host", *, starts: bool) -> None:
        """From now on (or no longer) whatever comes from `other` vanishes without a word."""
        rule = ("-I" if starts else "-D", *_DROP, other.address)
        _run("ip", "netns", "exec", self.namespace, "iptables", *rule)

    def _enter(self) -> None:
        with open(f"/run/netns/{self.namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """One host per name, all within reach of each other; gone at the end, with their cables."""
    prefix = f"seedrl{os.getpid()}"
    switch = f"{prefix}-switch"
    made = []
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names, 1):
            host = Host(f"{prefix}-{name}", f"10.201.7.{number}")
            _run("ip", "netns", "add", host.namespace)
            made.append(host)
            _connect(host, switch, f"port{number}")
        _run("ip", "netns", "exec", made[0].namespace, "iptables", "-w", "-L", "INPUT", "-n")
        yield made
    finally:
        for host in made:
            host.close()
        for namespace in (*(host.namespace for host in made), switch):
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


@contextmanager
def cut(left: list[Host], right: list[Host]) -> Iterator[None]:
    """During the block nothing gets from any of `left` to any of `right` or back: no reset, no refusal."""
    pairs = [(one, other) for one in left for other in right]
    pairs += [(other, one) for one, other in pairs]
    for one, other in pairs:
        one.drop(other, starts=True)
    try:
        yield
    finally:
        for one, other in pairs:
            one.drop(other, starts=False)


def _connect(host: Host, switch: str, port: str) -> None:
    cable = ("type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _run("ip", "-n", switch, "link", "add", port, *cable)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
    _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _run("ip", "-n", host.namespace, "link", "set", device, "up")


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
