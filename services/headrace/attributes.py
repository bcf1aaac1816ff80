"""Define all names of spans, attributes and metrics: headrace.*, gen_ai.* and rpc.*.

The semantic conventions still change (GenAI is in development; `rpc.status_code` was renamed in 2026), so
their names are used from this file only.
"""

from __future__ import annotations

# Spans, in the order of a request. Spans of an RPC's server and client are named by its method, such as
# "headrace.v1.GenerationService/Generate", as the RPC conventions require.
SPAN_SCORE = "router.score"
SPAN_CHECK = "router.check"
SPAN_SHADOW = "router.shadow"
SPAN_TOKENIZE = "batcher.tokenize"
SPAN_QUEUE = "batcher.queue"
SPAN_BATCH = "batcher.batch"
SPAN_PREFILL = "worker.prefill"
SPAN_DECODE = "worker.decode"
SPAN_UPSTREAM_QUEUE = "upstream.queue"

EVENT_FIRST_TOKEN = "first_token"
EVENT_FINISH = "finish"
EVENT_FAILOVER = "failover"

# RPC semantic conventions (stable).
RPC_SYSTEM = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS_CODE = "rpc.status_code"
ERROR_TYPE = "error.type"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"

# HTTP semantic conventions (stable).
HTTP_METHOD = "http.request.method"
HTTP_ROUTE = "http.route"
HTTP_STATUS_CODE = "http.response.status_code"
URL_SCHEME = "url.scheme"
URL_PATH = "url.path"

# GenAI semantic conventions (development).
GEN_AI_OPERATION = "gen_ai.operation.name"
GEN_AI_PROVIDER = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
GEN_AI_FINISH_REASONS = "gen_ai.response.finish_reasons"
GEN_AI_INPUT_MESSAGES = "gen_ai.input.messages"
GEN_AI_OUTPUT_MESSAGES = "gen_ai.output.messages"
GEN_AI_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
GEN_AI_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"

# Headrace.
REQUEST_ID = "headrace.request.id"
TIER = "headrace.tier"
SCORE = "headrace.score"
ROUTE_REASON = "headrace.route.reason"
TOKEN_KIND = "headrace.token.kind"
CHECK_GOOD = "headrace.check.good"
CHECK_REASONS = "headrace.check.reasons"
BATCH_ID = "headrace.batch.id"
BATCH_SIZE = "headrace.batch.size"
BATCH_TOKENS = "headrace.batch.tokens"
WORKER = "headrace.worker.id"
BATCHER = "headrace.batcher.address"
ATTEMPT = "headrace.attempt"
OUTCOME = "headrace.outcome"
QUEUE_STAGE = "headrace.queue.stage"
FINISH_REASON = "headrace.finish_reason"
WASTE_CAUSE = "headrace.waste.cause"
ROUTE_CAUSE = "headrace.route.cause"
VERDICT = "headrace.verdict"
TOKEN_SOURCE = "headrace.token.source"
CREDIT_KIND = "headrace.credit.kind"
STATE = "headrace.state"
TENANT = "headrace.tenant"
TENANT_CLASS = "headrace.tenant.class"
QUOTA_LIMIT = "headrace.quota.limit"
QUOTA_MODE = "headrace.quota.mode"
ARM = "headrace.arm"
CANARY_MEASURE = "headrace.canary.measure"
SHADOW_BOUND = "headrace.shadow.bound"

# Metrics are declared in `metrics.catalogue`. Bucket boundaries from the conventions, in seconds, except for
# BUCKETS_ITL, BUCKETS_SIZE and BUCKETS_SHARE.
BUCKETS_CALL = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
BUCKETS_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
BUCKETS_TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
BUCKETS_ITL = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
BUCKETS_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
BUCKETS_SIZE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BUCKETS_SHARE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
BUCKETS_LAG = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
