"""Draw the distributions of latencies, and the throughput over time or over the load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headrace.cli.bench.figures import tokens_per_second
from headrace.cli.bench.options import BadOption

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from headrace.cli.bench.load import Run


def check_plot(path: Path) -> None:
    """Raise BadOption if no picture can be written to *path*, before the load is sent."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise BadOption("--plot needs matplotlib: pip install 'headrace[plot]'") from None
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in known:
        raise BadOption(f"--plot {path}: the name must end in .png, .svg or another of {', '.join(known)}")


def draw(runs: Sequence[Run], results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a picture of one run, or of several with different loads. Raises BadOption."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), dpi=120)
    try:
        labels = [_label(result) for result in results] if len(runs) > 1 else [""]
        for run, label in zip(runs, labels, strict=True):
            completed = [record for record in run.records if record.complete]
            _distribution(axes[0], [record.ttft for record in completed], label)
            _distribution(axes[1], [gap for record in completed for gap in record.gaps], label)
        axes[0].set_xlabel("TTFT, ms")
        axes[1].set_xlabel("ITL, ms")
        if len(runs) == 1:
            _over_time(axes[2], runs[0])
        else:
            _over_load(axes[2], results)
            axes[0].legend(fontsize="small")
        figure.tight_layout()
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BadOption(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        pyplot.close(figure)


def _label(result: Mapping[str, Any]) -> str:
    if result["request_rate"] != "inf":
        return f"{result['request_rate']:g} req/s"
    return f"{result['max_concurrency']} at a time"


def _distribution(axes: Axes, seconds: Sequence[float], label: str) -> None:
    """Draw which share of values is below each value."""
    ordered = sorted(value * 1e3 for value in seconds)
    axes.step(
        ordered, [(place + 1) / len(ordered) for place in range(len(ordered))], where="post", label=label
    )
    axes.set_ylabel("share below")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)


def _over_time(axes: Axes, run: Run) -> None:
    rates = tokens_per_second([record for record in run.records if record.complete])
    rates = rates[:-1] or rates  # the last second is not a whole one
    axes.step(range(len(rates)), rates, where="post")
    axes.set_xlabel("s")
    axes.set_ylabel("output tokens/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _over_load(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    by_rate = results[0]["request_rate"] != "inf"
    name = "request_rate" if by_rate else "max_concurrency"
    axes.plot([result[name] for result in results], [result["output_throughput"] for result in results], "o-")
    axes.set_xlabel("requests/s sent" if by_rate else "concurrent requests")
    axes.set_ylabel("output tokens/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
