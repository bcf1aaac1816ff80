"""Show the progress of fetching models and of starting processes.

On a terminal the boards are updated in place; elsewhere they print a line for each change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from headrace.cli.answers import seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from headrace import models
    from headrace.cli.launch.readiness import StartState


class FetchBoard:
    """Progress bars of models; the *progress* argument of `models.resolve`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._tenths: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, progress: models.FetchProgress, /) -> None:
        key = (progress.model, progress.stage)
        if self._bars:
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(f"{progress.model} {progress.stage}", total=None)
            total = progress.total or None
            self._bars.update(self._tasks[key], completed=progress.done, total=total)
            return
        tenth = 10 * progress.done // progress.total if progress.total else 0
        if self._tenths.get(key) != tenth:
            self._tenths[key] = tenth
            of = f" {10 * tenth} % of {progress.total / 1e6:.0f} MB" if progress.total else ""
            self._console.print(f"{progress.model}: {progress.stage}{of}", highlight=False, markup=False)


class StartBoard:
    """A table of starting processes; the *on_states* argument of `mesh`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, transient=True) if console.is_terminal else None
        self._printed: dict[str, str] = {}
        self._spinner = Spinner("dots")

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Stop updating the terminal."""
        if self._live:
            self._live.stop()

    def __call__(self, states: Sequence[StartState], /) -> None:
        if self._live:
            self._live.update(self._table(states))
            return
        for state in states:
            status = _status(state)
            if self._printed.get(state.process.name) != status:
                self._printed[state.process.name] = status
                after = f" after {seconds(state.seconds)}" if state.phase == "ready" else ""
                about = f" ({state.process.about})" if state.process.about else ""
                line = f"{state.process.name}{about}: {status}{after}"
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _table(self, states: Sequence[StartState]) -> Table:
        table = Table.grid(padding=(0, 2))
        for state in states:
            ready = state.phase == "ready"
            table.add_row(
                "[green]✓[/]" if ready else self._spinner,
                state.process.name,
                Text(state.process.about, "dim"),
                Text(_status(state), "green" if ready else ""),
                f"[dim]{state.seconds:.0f} s[/]",
            )
        return table


def _status(state: StartState) -> str:
    return f"loading: {state.detail.removeprefix('loading ')}" if state.detail else state.phase
