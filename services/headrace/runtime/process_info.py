"""Report the resource use of a process, and name the AdminService, for the debug endpoint of each service."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.v1 import admin_service_pb2 as admin

SERVICES = tuple(admin.DESCRIPTOR.services_by_name.values())
INSPECT = "/headrace.v1.AdminService/Inspect"


def process_state(requests: ActiveRequests) -> admin.ProcessState:
    """Return the current resource use, which must not grow without bound while the process runs.

    Without /proc, files and memory are 0 and only threads of Python are counted.
    """
    state = admin.ProcessState(
        requests=requests.in_flight, tasks=len(asyncio.all_tasks()), threads=threading.active_count()
    )
    try:
        state.threads = len(os.listdir("/proc/self/task"))  # with those of libraries
        state.files = len(os.listdir("/proc/self/fd"))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return state
    state.memory_bytes = pages * os.sysconf("SC_PAGE_SIZE")
    return state
