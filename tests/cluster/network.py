"""Make hosts: network namespaces that are linked by a bridge, each with an address and a name server.

Everything is made in namespaces of the test and removed with them; the network of this machine is not
changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.deploy import tools

PREFIX = "headrace"
NETWORK = "10.231.77"  # each namespace has its own routes, so that it may exist elsewhere
NAME_SERVER = "names"
_CONFIGURATION = Path("/etc/netns")  # `ip netns exec` mounts a host's files over those in /etc


class Unavailable(Exception):
    """This machine cannot run namespaces; the message has the reason."""


@dataclass(frozen=True)
class Host:
    """One host. `namespace` and `fabric` are names of network namespaces; the latter has the bridge."""

    name: str
    address: str
    namespace: str
    fabric: str

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs a program on this host."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def cut(self) -> None:
        """Take its link down: packets in both directions are lost, and nobody is notified."""
        _ip("-n", self.fabric, "link", "set", "dev", self.name, "down")

    def mend(self) -> None:
        """Take its link up again."""
        _ip("-n", self.fabric, "link", "set", "dev", self.name, "up")

    def filter(self, rules: str) -> None:
        """Replace its packet filter by these rules of nftables."""
        nft = str(tools.find("nft"))
        subprocess.run(self.command(nft, "-f", "-"), input=f"flush ruleset\n{rules}", text=True, check=True)


@dataclass(frozen=True)
class Network:
    """The hosts by name."""

    hosts: Mapping[str, Host]

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]


def problem() -> str:
    """Return why this machine has no such networks; empty if it has."""
    if not hasattr(os, "geteuid") or os.geteuid():
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command `ip` (Debian: iproute2)"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", "name", "one", "type", "veth", "peer", "name", "other")
        _ip("-n", probe, "link", "add", "name", "switch", "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        return f"network namespaces cannot be made here: {detail.strip()}"
    finally:
        with suppress(OSError, subprocess.CalledProcessError):
            _ip("netns", "delete", probe)
    return ""


@contextmanager
def network(names: Sequence[str]) -> Generator[Network, None, None]:
    """Run a network with a host for each of *names* and one for the name server, while the block runs."""
    _remove_left_behind()
    prefix = f"{PREFIX}-{os.getpid()}"
    fabric = f"{prefix}-fabric"
    hosts = {
        name: Host(name, f"{NETWORK}.{10 + number}", f"{prefix}-{name}", fabric)
        for number, name in enumerate([NAME_SERVER, *names])
    }
    try:
        _ip("netns", "add", fabric)
        _ip("-n", fabric, "link", "add", "name", "switch", "type", "bridge")
        _ip("-n", fabric, "link", "set", "dev", "switch", "up")
        for host in hosts.values():
            _connect(host, hosts[NAME_SERVER].address)
        yield Network(hosts)
    finally:
        for namespace in [fabric, *(host.namespace for host in hosts.values())]:
            _remove(namespace)


def network_of(pid: int, names: Sequence[str]) -> Network:
    """Return the network that the process *pid* runs, for a process on one of its hosts."""
    prefix = f"{PREFIX}-{pid}"
    return Network(
        {
            name: Host(name, f"{NETWORK}.{10 + number}", f"{prefix}-{name}", f"{prefix}-fabric")
            for number, name in enumerate([NAME_SERVER, *names])
        }
    )


def _connect(host: Host, name_server: str) -> None:
    """Make a host, with a link to the bridge."""
    configuration = _CONFIGURATION / host.namespace
    configuration.mkdir(parents=True, exist_ok=True)
    (configuration / "resolv.conf").write_text(
        f"nameserver {name_server}\noptions timeout:1 attempts:2\n", encoding="ascii"
    )
    _ip("netns", "add", host.namespace)
    peer = ("peer", "name", "eth0", "netns", host.namespace)
    _ip("-n", host.fabric, "link", "add", "name", host.name, "type", "veth", *peer)
    _ip("-n", host.fabric, "link", "set", "dev", host.name, "master", "switch", "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", host.namespace, "link", "set", "dev", "lo", "up")
    _ip("-n", host.namespace, "link", "set", "dev", "eth0", "up")


def _remove(namespace: str) -> None:
    with suppress(subprocess.CalledProcessError):
        _ip("netns", "delete", namespace)
    shutil.rmtree(_CONFIGURATION / namespace, ignore_errors=True)


def _remove_left_behind() -> None:
    """Remove the networks of processes that were killed."""
    for line in _ip("netns", "list").splitlines():
        namespace = line.split()[0]
        prefix, _, rest = namespace.partition("-")
        owner = rest.partition("-")[0]
        if prefix == PREFIX and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _remove(namespace)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
