"""Run a service as several processes that listen on one port: `--processes`.

Python code of one process uses one core. Linux assigns each new connection to one of the processes
(SO_REUSEPORT), where it stays. What the processes must share is up to the service.

The process that was started becomes the supervisor: it forks the others, serves nothing, and exits when they
have ended. `prefork` must run before there are event loops, gRPC objects or threads of Python, because these
do not survive a fork.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

from headrace.channel import join
from headrace.runtime.serving.bind_check import bind_error, explain

log = logging.getLogger(__name__)

RESTART_SECONDS = 1.0  # between two starts of the same process
_IDLE_SECONDS = 3600.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STOP = (signal.SIGTERM, signal.SIGINT)
_SIGNALS = (*_STOP, signal.SIGCHLD)


class Roster:
    """Decide which processes run: each is replaced when it ends, unless it ended with an error of its own.

    A process that a signal killed, or that drained because it received SIGTERM itself, is started again. One
    that exits with a status other than 0 has logged why, and another one would fail in the same way: then the
    service ends with that status, as a single process would. The caller passes the time.

    count   number of processes
    """

    def __init__(self, count: int) -> None:
        self.status = 0
        self.stopping = False
        self.running: dict[int, int] = {}  # numbers of processes, by process id
        self._due = dict.fromkeys(range(count), 0.0)  # when each process that does not run is started
        self._started: dict[int, float] = {}

    @property
    def finished(self) -> bool:
        """Whether the service has ended."""
        return self.stopping and not self.running

    def due(self, now: float) -> list[int]:
        """Return the numbers of the processes to start now."""
        return [] if self.stopping else [number for number, at in self._due.items() if at <= now]

    def pause(self, now: float) -> float:
        """Return the seconds until `due` changes by itself."""
        if self.stopping:
            return _IDLE_SECONDS
        return min((max(at - now, 0.0) for at in self._due.values()), default=_IDLE_SECONDS)

    def start(self, number: int, pid: int, now: float) -> None:
        """Record that a process was started."""
        del self._due[number]
        self.running[pid] = number
        self._started[number] = now

    def end(self, pid: int, status: int) -> None:
        """Record that a process ended.

        status   its exit status, or minus the number of the signal that killed it
        """
        number = self.running.pop(pid)
        self._due[number] = self._started[number] + RESTART_SECONDS
        if status > 0:
            self.status = self.status or status
            self.stopping = True


def prefork(count: int, host: str, port: int) -> tuple[int, int]:
    """Fork *count* processes; return in each of them with its number, from 0, and the port to listen on.

    port   0 picks a free one

    The process that calls it supervises the others and never returns: it raises SystemExit when they have
    ended, or if the port cannot be used. On SIGTERM or SIGINT it frees the port, passes SIGTERM on, and waits
    for them to drain. If it is killed, they drain as well. Tornado's `fork_processes` has the same form.
    """
    supervisor, roster = os.getpid(), Roster(count)
    with ExitStack() as reservation:
        try:
            shared = reservation.enter_context(shared_port(host, port))
        except (OSError, UnicodeError) as error:
            log.critical(explain(error, host, port))
            raise SystemExit(1) from None
        # Signals are taken one at a time, by `sigtimedwait`: none interrupts a decision or is lost.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        while not roster.stopping:
            for number in roster.due(time.monotonic()):
                if (pid := os.fork()) == 0:
                    _become_process(supervisor, mask)
                    return number, shared  # and close this process's copies of the reservation
                roster.start(number, pid, time.monotonic())
                log.info("process started", extra={"number": number, "pid": pid})
            _await_signal(roster)
    # The reservation has ended, so that another service can take the port while this one drains.
    for pid in roster.running:
        os.kill(pid, signal.SIGTERM)
    while not roster.finished:
        _await_signal(roster)
    raise SystemExit(roster.status)


@contextmanager
def shared_port(host: str, port: int) -> Iterator[int]:
    """Reserve a port for processes that listen on it together, while the block runs; yield its number.

    port   0 picks a free one

    A server that is not one of these processes cannot use the port: after they listen, because it does not
    share it; before, because of a lock. Raises OSError, and UnicodeError for an invalid name.
    """
    if (problem := bind_error(host, port)) is not None:
        raise problem
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with (
        closing(socket.socket(family, kind, protocol)) as holder,
        closing(socket.socket(socket.AF_UNIX)) as lock,
    ):
        # It keeps a port that was picked, and receives no connections because it does not listen.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(address)
        number = int(holder.getsockname()[1])
        # In Linux's abstract namespace: the name ends with its socket, and belongs to the same network
        # namespace as the port.
        lock.bind(f"\0headrace {join(host, number)}")
        yield number


def _become_process(supervisor: int, mask: set[int | signal.Signals]) -> None:
    """Restore the signals in a new process, and have it drain when the supervisor ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if os.getppid() != supervisor:  # it ended before
        raise SystemExit(1)


def _await_signal(roster: Roster) -> None:
    """Wait for a signal or until a process is due, and record what happened."""
    received = signal.sigtimedwait(_SIGNALS, roster.pause(time.monotonic()))
    if received is not None and received.si_signo in _STOP:
        roster.stopping = True
        return
    # One SIGCHLD may stand for several processes.
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended[0], os.waitstatus_to_exitcode(ended[1])
            if pid not in roster.running:  # as process 1 of a container, this one inherits orphans
                continue
            number = roster.running[pid]
            roster.end(pid, status)
            if not roster.stopping:
                log.warning("process ended", extra={"number": number, "pid": pid, "status": status})
            elif status > 0:
                log.error("process failed", extra={"number": number, "pid": pid, "status": status})
