"""Write one Markdown table per model, and one plot, from cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.figures import Spread, spread

Cell = Mapping[str, Any]

_OURS, _OURS_BARE, _PEER = "#d1495b", "#edae49", "#8d99ae"


def summarise(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Merge the repetitions of each (model, system, concurrency).

    Only clean runs count. If there are none, the others count, and `clean` is False.
    """
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        if "figures" in cell:
            groups.setdefault((cell["model"], cell["system"], cell["concurrency"]), []).append(cell)
    rows = []
    for (model, system, concurrency), group in groups.items():
        clean = [cell for cell in group if cell["clean"]]
        counted = clean or group
        figures = [dict(cell["figures"], peak_mib=cell["peak_mib"]) for cell in counted]
        names = sorted({name for figure in figures for name in figure})
        rows.append(
            {
                "model": model,
                "system": system,
                "concurrency": concurrency,
                "runs": len(counted),
                "clean": bool(clean),
                "complete": all(cell["complete"] for cell in counted),
                "figures": {name: found for name in names if (found := spread(figures, name))},
            }
        )
    return rows


def best_peer(rows: Sequence[Mapping[str, Any]], model: str, concurrency: int) -> tuple[str, float] | None:
    """Return the fastest system other than Headrace at a concurrency, and its tokens per second."""
    rates = [
        (row["figures"]["output_tokens_per_s"].median, row["system"])
        for row in rows
        if (row["model"], row["concurrency"]) == (model, concurrency)
        and not row["system"].startswith("headrace")
    ]
    return (max(rates)[1], max(rates)[0]) if rates else None


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one table per model, with a line per system and concurrency."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = [
            f"### {model}",
            "",
            "| system | at a time | tokens/s (range) | of best peer | requests/s | TTFT p50 / p90 / p99 ms "
            "| TPOT p50 ms | ITL p50 / p90 / p99 ms | E2EL p50 / p99 s | peak MiB | runs |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        chosen = [row for row in rows if row["model"] == model]
        chosen.sort(key=lambda row: (row["concurrency"], -row["figures"]["output_tokens_per_s"].median))
        lines += [
            f"| {' | '.join(_columns(row, best_peer(rows, model, row['concurrency'])))} |" for row in chosen
        ]
        if any(not row["clean"] for row in chosen):
            lines += ["", "† other processes used the CPU during every run of this cell: unreliable"]
        if any(not row["complete"] for row in chosen):
            lines += ["", "‡ cut off by --cell-seconds: only the first requests of the workload"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _columns(row: Mapping[str, Any], best: tuple[str, float] | None) -> list[str]:
    figures: Mapping[str, Spread] = row["figures"]
    rate = figures["output_tokens_per_s"]
    flags = ("" if row["clean"] else " †") + ("" if row["complete"] else " ‡")
    bold = "**" if row["system"].startswith("headrace") else ""
    return [
        f"{bold}{row['system']}{bold}",
        str(row["concurrency"]),
        f"{bold}{rate.median:.0f}{bold} ({rate.low:.0f}-{rate.high:.0f}){flags}",
        f"{rate.median / best[1]:.2f}" if best else "",
        f"{figures['requests_per_s'].median:.2f}",
        _times(figures, "ttft", (50, 90, 99), 1, 0),
        _times(figures, "tpot", (50,), 1, 1),
        _times(figures, "itl", (50, 90, 99), 1, 0),
        _times(figures, "e2el", (50, 99), 1e-3, 1),
        f"{figures['peak_mib'].high:.0f}",
        str(row["runs"]),
    ]


def _times(
    figures: Mapping[str, Spread], name: str, percents: Sequence[int], scale: float, digits: int
) -> str:
    values = [figures.get(f"{name}_p{percent}_ms") for percent in percents]
    return " / ".join("" if value is None else f"{value.median * scale:.{digits}f}" for value in values)


def plot(rows: Sequence[Mapping[str, Any]], file: Path, caption: str) -> bool:
    """Draw tokens per second by concurrency, a panel per model. Returns False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    concurrencies = sorted({row["concurrency"] for row in rows})
    size = (4.6 * len(concurrencies), 4.2 * len(models))
    figure, grid = pyplot.subplots(len(models), len(concurrencies), figsize=size, squeeze=False)
    for line, model in zip(grid, models, strict=True):
        for axes, concurrency in zip(line, concurrencies, strict=True):
            chosen = sorted(
                (row for row in rows if (row["model"], row["concurrency"]) == (model, concurrency)),
                key=lambda row: row["figures"]["output_tokens_per_s"].median,
            )
            rates = [row["figures"]["output_tokens_per_s"] for row in chosen]
            medians = [rate.median for rate in rates]
            around = [
                [rate.median - rate.low for rate in rates],
                [rate.high - rate.median for rate in rates],
            ]
            names = [row["system"] for row in chosen]
            bars = axes.barh(
                names, medians, xerr=around, color=[_colour(name) for name in names], ecolor="#333"
            )
            axes.bar_label(bars, [f" {rate:.0f}" for rate in medians], label_type="edge", fontsize=8)
            axes.margins(x=0.18)
            axes.set_title(f"{model}, {concurrency} at a time", fontsize=10)
            axes.set_xlabel("output tokens/s", fontsize=9)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(caption, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
    return True


def _colour(name: str) -> str:
    if name.startswith("headrace-mesh"):
        return _OURS
    return _OURS_BARE if name.startswith("headrace") else _PEER
