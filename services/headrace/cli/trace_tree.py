"""Draw a trace as a tree: who did what for one request, when, and for how long."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from rich.text import Text
from rich.tree import Tree

from headrace.cli.answers import seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from headrace.cli.otlp_sink import Span

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue")


def trace_tree(spans: Sequence[Span], trace_id: str) -> Tree:
    """Build the tree of *trace_id* out of *spans*, which may hold other traces too.

    Spans of other traces that link to this one, such as the batch that a request was part of, hang
    below the span that they are linked with. A span whose parent never arrived is shown as a root.
    """
    ours = sorted((span for span in spans if span.trace_id == trace_id), key=lambda span: span.start)
    known = {span.span_id: span for span in spans}
    ids = {span.span_id for span in ours}
    began = ours[0].start if ours else 0
    services = list(dict.fromkeys(span.service for span in ours))
    colours = {service: _COLOURS[n % len(_COLOURS)] for n, service in enumerate(services)}
    children: dict[str, list[Span]] = defaultdict(list)
    for span in ours:
        children[span.parent_id if span.parent_id in ids else ""].append(span)
    linking: dict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.start):
        for linked in span.links:
            if span.trace_id != trace_id and linked in ids:
                linking[linked].append(span)

    def grow(branch: Tree, span: Span) -> None:
        twig = branch.add(_span(span, began, colours))
        rows: list[tuple[int, Text | Span]] = [
            (event.at, _event(event.name, event.at - began)) for event in span.events
        ]
        others = {other.span_id: other for other in linking[span.span_id]}
        others |= {linked: known[linked] for linked in span.links if linked in known and linked not in ids}
        rows += [(other.start, _linked(other, began)) for other in others.values()]
        missing = [linked for linked in span.links if linked not in known]
        rows += [(span.start, Text(f"⇄ linked with span {linked}", "dim")) for linked in missing]
        rows += [(child.start, child) for child in children[span.span_id]]
        for _, row in sorted(rows, key=lambda row: row[0]):
            if isinstance(row, Text):
                twig.add(row)
            else:
                grow(twig, row)

    tree = Tree(Text.assemble("trace ", (trace_id or "(none)", "bold")))
    for root in children[""]:
        grow(tree, root)
    return tree


def _span(span: Span, began: int, colours: Mapping[str, str]) -> Text:
    return Text.assemble(
        (f"{_offset(span.start - began):>10} ", "dim"),
        (span.service, colours.get(span.service, "")),
        " ",
        (span.name, "bold red" if span.failed else "bold"),
        f" {seconds((span.end - span.start) / 1e9)}",
        (" failed" if span.failed else "", "red"),
    )


def _event(name: str, offset: int) -> Text:
    return Text.assemble((f"{_offset(offset):>10} ", "dim"), ("• ", "dim"), name)


def _linked(span: Span, began: int) -> Text:
    return Text.assemble(
        (f"{_offset(span.start - began):>10} ", "dim"),
        ("⇄ ", "dim"),
        f"{span.service} {span.name} {seconds((span.end - span.start) / 1e9)}",
        (f" linked with {len(span.links)} request{'' if len(span.links) == 1 else 's'}", "dim"),
    )


def _offset(nanoseconds: int) -> str:
    sign = "-" if nanoseconds < 0 else "+"
    return f"{sign}{seconds(abs(nanoseconds) / 1e9)}"
