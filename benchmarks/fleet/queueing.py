"""Formulas of queueing theory, which answer simple questions, and against which the simulation is checked.

Times are in seconds, rates per second; *load* is the mean number of busy servers (rate times service time, in
Erlang).
"""

from __future__ import annotations

import math


class Unstable(Exception):
    """More work arrives than the servers can do, so the queue grows without end."""


def probability_of_waiting(servers: int, load: float) -> float:
    """Return the probability that an arrival finds all servers busy (Erlang C). Raises Unstable."""
    if load >= servers:
        raise Unstable(f"{load:.2f} busy servers of {servers}")
    # Erlang B by recursion, because load ** servers overflows for hundreds of servers.
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def mean_wait(servers: int, rate: float, service: float, variation: float = 1.0) -> float:
    """Return the mean wait in one queue for *servers* servers with Poisson arrivals. Raises Unstable.

    service     mean service time
    variation   squared coefficient of variation of the service time: 1 for exponential, 0 for constant

    Exact for exponential times and for one server (Pollaczek-Khinchine); otherwise the approximation of Lee
    and Longton (1959), which is good where many servers are busy.
    """
    load = rate * service
    exponential = probability_of_waiting(servers, load) * service / (servers - load)
    return exponential * (1 + variation) / 2


def servers_for(rate: float, service: float, *, waiting: float) -> int:
    """Return the fewest servers with which at most the share *waiting* of arrivals must wait."""
    load = rate * service
    servers = math.floor(load) + 1
    while probability_of_waiting(servers, load) > waiting:
        servers += 1
    return servers
