"""What every service's AdminService has in common: its names, and what the process holds of its system."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

from headrace.runtime.interceptors import Activity
from headrace.v1 import admin_service_pb2 as admin

SERVICES = tuple(admin.DESCRIPTOR.services_by_name.values())
INSPECT = "/headrace.v1.AdminService/Inspect"


def vitals(activity: Activity) -> admin.ProcessState:
    """What must not grow while the process runs, as of now.

    Where the system does not tell (there is no /proc), files and memory are 0, and threads are those of
    Python alone.
    """
    state = admin.ProcessState(
        requests=activity.in_flight, tasks=len(asyncio.all_tasks()), threads=threading.active_count()
    )
    try:
        state.threads = len(os.listdir("/proc/self/task"))  # those of libraries, too
        state.files = len(os.listdir("/proc/self/fd"))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return state
    state.memory_bytes = pages * os.sysconf("SC_PAGE_SIZE")
    return state
