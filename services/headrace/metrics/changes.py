"""Declare the metrics of changes to the routing: scorer files, canary, shadow answers, decision log.

`catalogue.METRICS` includes them.
"""

from __future__ import annotations

from typing import Final

from headrace.metrics.instruments import Counter, CounterSeries, Gauge, GaugeSeries, Metric

_ROUTER = ("router",)

SCORER_READS: Final = Counter(
    "headrace.scorer.reads",
    "{read}",
    ("arm", "verdict"),
    "changed scorer and calibration files that the router read, by whether it uses them",
    services=_ROUTER,
)
CANARY_SHARE: Final = Gauge(
    "headrace.canary.share",
    "1",
    (),
    "share of requests that the candidate of --canary scores; 0 after a roll-back",
    services=_ROUTER,
)
CANARY_REQUESTS: Final = Counter(
    "headrace.canary.requests",
    "{request}",
    ("arm", "outcome"),
    "requests that ended while there was a canary, by the scorer that scored them",
    services=_ROUTER,
)
CANARY_RATINGS: Final = Counter(
    "headrace.canary.ratings",
    "{answer}",
    ("arm", "verdict"),
    "rated answers, by the scorer that scored their requests",
    services=_ROUTER,
)
CANARY_COST: Final = Counter(
    "headrace.canary.cost",
    "{cost}",
    ("arm",),
    "cost at the configured prices while there was a canary, by the scorer that scored the requests",
    services=_ROUTER,
)
CANARY_ROLLBACKS: Final = Counter(
    "headrace.canary.rollbacks",
    "{rollback}",
    ("measure",),
    "roll-backs of a canary, by the measure in which it was worse",
    services=_ROUTER,
)
SHADOW_REQUESTS: Final = Counter(
    "headrace.shadow.requests",
    "{request}",
    ("tier", "outcome"),
    "shadow requests that ended, by the tier that they were sent to",
    services=_ROUTER,
)
SHADOW_SKIPPED: Final = Counter(
    "headrace.shadow.skipped",
    "{request}",
    ("bound",),
    "drawn requests that got no shadow answer, by the bound that prevented it",
    services=_ROUTER,
)
SHADOW_TOKENS: Final = Counter(
    "headrace.shadow.tokens",
    "{token}",
    ("tier", "kind"),
    "tokens of shadow requests and judges, which are on no caller's bill",
    services=_ROUTER,
)
SHADOW_COST: Final = Counter(
    "headrace.shadow.cost",
    "{cost}",
    ("tier",),
    "cost of shadow requests and judges at the configured prices",
    services=_ROUTER,
)
SHADOW_VERDICTS: Final = Counter(
    "headrace.shadow.verdicts",
    "{comparison}",
    ("tier", "verdict"),
    "judged comparisons of a shadow answer with the caller's, by the tier of the shadow answer",
    services=_ROUTER,
)
DECISION_LOG_ROWS: Final = Counter(
    "headrace.decision_log.rows", "{row}", (), "rows that were written to --decision-log", services=_ROUTER
)
DECISION_LOG_DROPPED: Final = Counter(
    "headrace.decision_log.dropped",
    "{row}",
    (),
    "rows that were not written to --decision-log: its queue was full, or the disk failed",
    services=_ROUTER,
)

METRICS: Final[tuple[Metric[CounterSeries] | Metric[GaugeSeries], ...]] = tuple(
    value for value in globals().values() if isinstance(value, Metric)
)
