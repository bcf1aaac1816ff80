"""Draw a trace as a tree: the spans of one request, with start and duration."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING

from rich.text import Text
from rich.tree import Tree

from headrace.cli.answers import seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from headrace.cli.demo.otlp_receiver import Span

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue")


def trace_tree(spans: Sequence[Span], trace_id: str) -> Tree:
    """Return the tree of *trace_id* from *spans*, which may contain other traces.

    A span of another trace that is linked with this one, such as the batch of a request, is drawn below the
    first span that it is linked with. A span without its parent is drawn as a root.
    """
    ours = sorted((span for span in spans if span.trace_id == trace_id), key=lambda span: span.start)
    known = {span.span_id: span for span in spans}
    ids = {span.span_id for span in ours}
    began = ours[0].start if ours else 0
    colours = dict(zip(dict.fromkeys(span.service for span in ours), itertools.cycle(_COLOURS), strict=False))
    children: dict[str, list[Span]] = defaultdict(list)
    for span in ours:
        children[span.parent_id if span.parent_id in ids else ""].append(span)
    drawn: set[str] = set()

    def linked_spans(span: Span) -> list[Span]:
        """Return the spans of other traces that are linked with *span*, either way, and not drawn."""
        found = [known[link] for link in span.links if link in known]
        found += [other for other in spans if span.span_id in other.links]
        new = {other.span_id: other for other in found if other.span_id not in ids | drawn}
        drawn.update(new)
        return list(new.values())

    def draw(branch: Tree, span: Span) -> None:
        node = branch.add(_span(span, began, colours))
        rows: list[tuple[int, Text | Span]] = [(child.start, child) for child in children[span.span_id]]
        rows += [(event.at, _event(event.name, event.at - began)) for event in span.events]
        rows += [(other.start, _linked(other, began, colours)) for other in linked_spans(span)]
        for _, row in sorted(rows, key=lambda row: row[0]):
            if isinstance(row, Text):
                node.add(row)
            else:
                draw(node, row)

    tree = Tree(Text.assemble("trace ", (trace_id or "(none)", "bold")))
    for root in children[""]:
        draw(tree, root)
    return tree


def busiest(spans: Sequence[Span], trace_ids: Sequence[str]) -> str:
    """Return the trace of *trace_ids* that shares a span with the most others, or else the first."""
    trace_of = {span.span_id: span.trace_id for span in spans}
    shared = dict.fromkeys(trace_ids, 0)
    for span in spans:
        for linked in {trace_of.get(link, "") for link in span.links} & shared.keys():
            shared[linked] = max(shared[linked], len(span.links))
    return max(trace_ids, key=lambda trace_id: shared[trace_id])


def _label(span: Span, colours: Mapping[str, str]) -> Text:
    """Return the service and name of a span, with an arrow if it is a call to another process."""
    service, name = span.service.removeprefix("headrace-"), span.name.removeprefix("headrace.v1.")
    # A name such as "batcher.queue" includes the service.
    service_label = "" if name.startswith(f"{service}.") else f"{service} "
    colour = colours.get(span.service, "")
    return Text.assemble(
        (service_label, colour), "→ " if span.kind == "client" else "", (name, f"bold {colour}")
    )


def _span(span: Span, began: int, colours: Mapping[str, str]) -> Text:
    return Text.assemble(
        (f"{_offset(span.start - began):>10} ", "dim"),
        _label(span, colours),
        f" {seconds((span.end - span.start) / 1e9)}",
        (" failed" if span.failed else "", "bold red"),
    )


def _event(name: str, offset: int) -> Text:
    return Text.assemble((f"{_offset(offset):>10} ", "dim"), ("• ", "dim"), name)


def _linked(span: Span, began: int, colours: Mapping[str, str]) -> Text:
    count = len(span.links)
    return Text.assemble(
        (f"{_offset(span.start - began):>10} ", "dim"),
        ("⇄ ", "dim"),
        _label(span, colours),
        f" {seconds((span.end - span.start) / 1e9)}",
        (f" with {count} request{'' if count == 1 else 's'}" if count else "", "dim"),
    )


def _offset(nanoseconds: int) -> str:
    sign = "-" if nanoseconds < 0 else "+"
    return f"{sign}{seconds(abs(nanoseconds) / 1e9)}"
