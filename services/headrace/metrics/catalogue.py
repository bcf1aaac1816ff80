"""Declare every metric that Headrace emits. docs/metrics.md is the same list, which a test holds.

The metrics of changes to the routing (canary, shadow, decision log) are in `changes.py`, and those of HTTP
requests to services outside of the mesh in `upstream.py`.

`gen_ai.server.*` and `headrace.requests` are recorded by router, batcher and upstream, which all implement
GenerationService: the router's are what its callers experience, with drafts, failover and other tiers. In
Prometheus, the label `service_name` tells them apart.
"""

from __future__ import annotations

from typing import Final

from headrace import attributes
from headrace.metrics import changes, upstream
from headrace.metrics.instruments import (
    Counter,
    CounterSeries,
    Gauge,
    GaugeSeries,
    Histogram,
    HistogramSeries,
    Metric,
)

ROUTER, BATCHER, WORKER, UPSTREAM = "router", "batcher", "worker", "upstream"
CLIENT, GATEWAY = "client", "gateway"
_SERVERS = (ROUTER, BATCHER, UPSTREAM)
_GRPC = (ROUTER, BATCHER, WORKER, UPSTREAM)
_ALL = (*_GRPC, GATEWAY)
_RPC = ("rpc_system", "method", "status", "error")
_GEN_AI = ("operation", "provider", "model", "tier")
_MODEL = ("tier", "model")

# Calls, by the RPC conventions.
SERVER_CALL_DURATION: Final = Histogram(
    "rpc.server.call.duration",
    "s",
    _RPC,
    "duration of calls, and of requests on shared streams",
    services=_GRPC,
    bounds=attributes.BUCKETS_CALL,
)
CLIENT_CALL_DURATION: Final = Histogram(
    "rpc.client.call.duration",
    "s",
    _RPC,
    "duration of calls to a batcher, or of the client library's calls",
    services=(ROUTER, CLIENT, GATEWAY),
    bounds=attributes.BUCKETS_CALL,
)
CALLS_IN_FLIGHT: Final = Gauge(
    "headrace.calls.in_flight",
    "{call}",
    (),
    "calls that are being served, those on shared streams included",
    services=_GRPC,
)

# HTTP requests, by the HTTP conventions.
HTTP_REQUEST_DURATION: Final = Histogram(
    "http.server.request.duration",
    "s",
    ("http_method", "http_route", "http_status", "error", "scheme"),
    "time from the arrival of an HTTP request's headers to the end of its response",
    services=(GATEWAY,),
    bounds=attributes.BUCKETS_CALL,
)
HTTP_ACTIVE_REQUESTS: Final = Gauge(
    "http.server.active_requests",
    "{request}",
    ("http_method", "scheme"),
    "requests over HTTP that are being answered",
    services=(GATEWAY,),
)
HTTP_TIME_TO_FIRST_TOKEN: Final = Histogram(
    "headrace.http.time_to_first_token",
    "s",
    ("http_route",),
    "time from the arrival of an HTTP request's headers to the first token of its response",
    services=(GATEWAY,),
    bounds=attributes.BUCKETS_TTFT,
)
HTTP_CONNECTIONS: Final = Gauge(
    "headrace.http.connections",
    "{connection}",
    (),
    "open connections of HTTP clients",
    services=(GATEWAY,),
)

# Requests, by the GenAI conventions where these have a name.
REQUEST_DURATION: Final = Histogram(
    "gen_ai.server.request.duration",
    "s",
    (*_GEN_AI, "error"),
    "time from the arrival of a request to its end",
    services=_SERVERS,
    bounds=attributes.BUCKETS_DURATION,
)
TIME_TO_FIRST_TOKEN: Final = Histogram(
    "gen_ai.server.time_to_first_token",
    "s",
    _GEN_AI,
    "time from the arrival of a request to its first token, with all waiting",
    services=_SERVERS,
    bounds=attributes.BUCKETS_TTFT,
)
TIME_PER_OUTPUT_TOKEN: Final = Histogram(
    "gen_ai.server.time_per_output_token",
    "s",
    _GEN_AI,
    "mean time per token after the first, of one answer",
    services=_SERVERS,
    bounds=attributes.BUCKETS_TPOT,
)
INTER_TOKEN_LATENCY: Final = Histogram(
    "headrace.inter_token_latency",
    "s",
    _MODEL,
    "time between tokens of an answer; tokens that arrive together count as one",
    services=_SERVERS,
    bounds=attributes.BUCKETS_ITL,
)
REQUESTS: Final = Counter(
    "headrace.requests",
    "{request}",
    (*_MODEL, "outcome", "error", "finish"),
    "requests that ended",
    services=_SERVERS,
)
REFUSED: Final = Counter(
    "headrace.requests.refused",
    "{request}",
    ("tier", "error", "tenant_class"),
    "requests that were not admitted or were shed, by reason",
    services=_ALL,
)
DELIVERED_TOKENS: Final = Counter(
    "headrace.tokens.delivered", "{token}", _MODEL, "answer tokens sent to callers", services=_SERVERS
)
WASTED_TOKENS: Final = Counter(
    "headrace.tokens.wasted",
    "{token}",
    ("tier", "cause"),
    "generated tokens that no caller received, or that had to be generated again",
    services=(ROUTER, BATCHER, WORKER),
)

# Tenants: the first ones by number of --metrics-tenants, the others together as "other".
TENANT_REQUESTS: Final = Counter(
    "headrace.tenant.requests",
    "{request}",
    ("tenant", "tenant_class", "outcome"),
    "requests that ended, by tenant",
    services=(ROUTER,),
)
TENANT_TOKENS: Final = Counter(
    "headrace.tenant.tokens",
    "{token}",
    ("tenant", "tenant_class", "kind"),
    "tokens on bills, by tenant",
    services=(ROUTER,),
)
TENANT_COST: Final = Counter(
    "headrace.tenant.cost",
    "{cost}",
    ("tenant", "tenant_class"),
    "cost at the configured prices, by tenant",
    services=(ROUTER,),
)

# Routing and cost.
ROUTED: Final = Counter(
    "headrace.routed",
    "{request}",
    ("tier", "route"),
    "decisions for a tier, by what decided",
    services=(ROUTER,),
)
DRAFTS: Final = Counter(
    "headrace.drafts", "{draft}", ("tier", "verdict"), "drafts that were checked", services=(ROUTER,)
)
FEEDBACK: Final = Counter(
    "headrace.feedback",
    "{answer}",
    ("tier", "verdict"),
    "answers that callers rated",
    services=(ROUTER,),
)
QUOTA_REFUSALS: Final = Counter(
    "headrace.quota.refusals",
    "{request}",
    ("tenant_class", "limit", "mode"),
    "requests over a limit of their tenant; with --quotas-shadow they are admitted",
    services=(ROUTER,),
)
BILLED_TOKENS: Final = Counter(
    "headrace.billed_tokens", "{token}", ("tier", "kind"), "tokens on bills", services=(ROUTER,)
)
COST: Final = Counter(
    "headrace.cost", "{cost}", ("tier",), "cost at the configured prices", services=(ROUTER,)
)
LARGEST_TIER_COST: Final = Counter(
    "headrace.largest_tier_cost",
    "{cost}",
    (),
    "what the same tokens would have cost on the largest tier",
    services=(ROUTER,),
)
BATCHERS: Final = Gauge(
    "headrace.batchers",
    "{batcher}",
    ("tier", "state"),
    "batchers that the router knows",
    services=(ROUTER,),
)

# Waiting and batching.
QUEUE_DEPTH: Final = Gauge(
    "headrace.queue.depth",
    "{request}",
    ("tier", "stage"),
    "requests that wait to be tokenised, for a check of a grammar, for a worker, or for an upstream",
    services=(BATCHER, UPSTREAM),
)
QUEUE_WAIT: Final = Histogram(
    "headrace.queue.wait",
    "s",
    ("tier", "stage", "outcome"),
    "how long requests waited to be tokenised, for a check of a grammar, for a worker, or for an upstream",
    services=(BATCHER, UPSTREAM),
    bounds=attributes.BUCKETS_TTFT,
)
BATCH_SIZE: Final = Histogram(
    "headrace.batch.size",
    "{request}",
    ("tier",),
    "requests per batch",
    services=(BATCHER,),
    bounds=attributes.BUCKETS_SIZE,
)
BATCH_FILL: Final = Histogram(
    "headrace.batch.fill",
    "1",
    ("tier",),
    "requests per batch as a share of --batch-size",
    services=(BATCHER,),
    bounds=attributes.BUCKETS_SHARE,
)
PAUSED: Final = Counter(
    "headrace.sequences.paused",
    "{sequence}",
    ("tier",),
    "answers paused until a slow reader caught up",
    services=(BATCHER,),
)
CREDIT_STALLS: Final = Counter(
    "headrace.credit.stalls",
    "{stall}",
    ("tier", "credit"),
    "times that work waited for credit: requests for a free slot at a worker, answers for a reader",
    services=_SERVERS,
)
WORKERS: Final = Gauge(
    "headrace.workers", "{worker}", ("tier", "state"), "workers that the batcher knows", services=(BATCHER,)
)
FAILOVERS: Final = Counter(
    "headrace.failovers",
    "{answer}",
    ("tier", "error"),
    "answers resumed on another worker (batcher) or batcher (router), by what was lost",
    services=(ROUTER, BATCHER),
)

# Workers.
RUNNING: Final = Gauge(
    "headrace.sequences.running", "{sequence}", _MODEL, "sequences in the engine's steps", services=(WORKER,)
)
WAITING: Final = Gauge(
    "headrace.sequences.waiting",
    "{sequence}",
    _MODEL,
    "sequences that wait for KV memory",
    services=(WORKER,),
)
ENDED: Final = Counter(
    "headrace.sequences.ended",
    "{sequence}",
    (*_MODEL, "outcome", "finish"),
    "sequences that ended",
    services=(WORKER,),
)
PREEMPTED: Final = Counter(
    "headrace.sequences.preempted",
    "{sequence}",
    _MODEL,
    "sequences preempted to free KV memory",
    services=(WORKER,),
)
KV_USAGE: Final = Gauge("headrace.kv.usage", "1", _MODEL, "share of KV memory in use", services=(WORKER,))
KV_CAPACITY: Final = Gauge(
    "headrace.kv.capacity", "{token}", _MODEL, "tokens that KV memory holds", services=(WORKER,)
)
PREFIX_TOKENS: Final = Counter(
    "headrace.prefix.tokens",
    "{token}",
    (*_MODEL, "source"),
    "prompt tokens, by whether the prefix cache had them or they were computed",
    services=(WORKER,),
)
SPECULATIVE_TOKENS: Final = Counter(
    "headrace.speculative.tokens",
    "{token}",
    (*_MODEL, "source"),
    "tokens that speculative decoding guessed, by whether they were the right ones",
    services=(WORKER,),
)
STEP_ROWS: Final = Histogram(
    "headrace.step.rows",
    "{sequence}",
    _MODEL,
    "sequences per engine step",
    services=(WORKER,),
    bounds=attributes.BUCKETS_SIZE,
)
STEP_FILL: Final = Histogram(
    "headrace.step.fill",
    "1",
    _MODEL,
    "sequences per engine step as a share of --max-running",
    services=(WORKER,),
    bounds=attributes.BUCKETS_SHARE,
)
STEP_DURATION: Final = Histogram(
    "headrace.step.duration",
    "s",
    _MODEL,
    "duration of an engine step",
    services=(WORKER,),
    bounds=attributes.BUCKETS_TTFT,
)
GENERATED_TOKENS: Final = Counter(
    "headrace.tokens.generated", "{token}", _MODEL, "tokens that the engine generated", services=(WORKER,)
)
TOKEN_RATE: Final = Gauge(
    "headrace.tokens_per_second",
    "{token}/s",
    _MODEL,
    "tokens that the engine generated in the last seconds, per second",
    services=(WORKER,),
)

# Processes.
EVENT_LOOP_LAG: Final = Histogram(
    "headrace.event_loop.lag",
    "s",
    (),
    "how much later than scheduled the event loop calls a timer, measured twice a second",
    services=_ALL,
    bounds=attributes.BUCKETS_LAG,
)
CPU_TIME: Final = Counter("process.cpu.time", "s", (), "CPU time of the process", services=_ALL)
MEMORY: Final = Gauge("process.memory.usage", "By", (), "resident memory of the process", services=_ALL)
OPEN_FILES: Final = Gauge(
    "process.open_fds",
    "{file_descriptor}",
    (),
    "open files and connections of the process",
    services=_ALL,
)

METRICS: Final[tuple[Metric[CounterSeries] | Metric[GaugeSeries] | Metric[HistogramSeries], ...]] = (
    *(value for value in globals().values() if isinstance(value, Metric)),
    *changes.METRICS,
    *upstream.METRICS,
)
