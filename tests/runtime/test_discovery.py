"""Addresses are added and removed, and a name server that fails removes none."""

from __future__ import annotations

import socket
from contextlib import aclosing

from headrace.endpoints.resolving import lookup
from headrace.runtime.discovery import Discovery


class Names:
    """A name server that returns these results in turn, None for a failure, and repeats the last one."""

    def __init__(self, *answers: set[str] | None) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, host: str, port: str) -> frozenset[str]:
        self.asked.append((host, port))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise OSError("no answer")
        return frozenset(answer)


async def changes(names: Names, count: int, *targets: str) -> list[set[str]]:
    seen: list[set[str]] = []
    discovery = Discovery(targets, resolve_seconds=0.001, lookup=names)
    async with aclosing(discovery.changes()) as stream:
        async for addresses in stream:
            seen.append(set(addresses))
            if len(seen) == count:
                break
    return seen


async def test_added_and_removed_replicas_are_reported() -> None:
    names = Names({"10.0.0.1:5"}, {"10.0.0.1:5", "10.0.0.2:5"}, {"10.0.0.2:5"})

    seen = await changes(names, 3, "dns:///pods:5")

    assert seen == [{"10.0.0.1:5"}, {"10.0.0.1:5", "10.0.0.2:5"}, {"10.0.0.2:5"}]
    assert names.asked[0] == ("pods", "5")


async def test_a_name_keeps_its_addresses_while_the_name_server_fails() -> None:
    names = Names({"10.0.0.1:5"}, None, None, {"10.0.0.3:5"})

    assert await changes(names, 2, "dns:pods:5") == [{"10.0.0.1:5"}, {"10.0.0.3:5"}]


async def test_addresses_and_other_targets_are_passed_on_unchanged() -> None:
    targets = ["127.0.0.1:1", "unix:/tmp/socket", "dns://8.8.8.8/pods:5"]
    names = Names(None)

    assert await changes(names, 1, *targets) == [set(targets)]
    assert names.asked == []


async def test_a_name_with_both_families_is_one_replica_per_host() -> None:
    found = await lookup("localhost", "5")

    assert found == {"127.0.0.1:5"} or all(socket.inet_pton(socket.AF_INET6, a[1:-3]) for a in found)


async def test_an_invalid_name_has_no_address() -> None:
    for name in ("dns:///a..b:5", f"dns:///{'x' * 70}.test:5"):
        assert await Discovery([name]).addresses() == frozenset()


async def test_each_address_keeps_the_name_that_its_certificate_contains() -> None:
    names = Names({"10.0.0.1:5", "10.0.0.2:5"})
    for target, name in (("dns:///pods.svc:5", "pods.svc"), ("dns:pods:5", "pods")):
        discovery = Discovery([target, "10.0.0.3:5"], lookup=names)

        assert await discovery.addresses() == {"10.0.0.1:5", "10.0.0.2:5", "10.0.0.3:5"}
        assert discovery.server_name("10.0.0.1:5") == discovery.server_name("10.0.0.2:5") == name
        assert discovery.server_name("10.0.0.3:5") == ""
