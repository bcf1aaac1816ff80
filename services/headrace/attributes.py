"""Define all names of spans, attributes and metrics: headrace.*, gen_ai.* and rpc.*.

The semantic conventions still change (GenAI is in development; `rpc.status_code` was renamed in 2026), so
their names are used from this file only.
"""

from __future__ import annotations

# Spans, in the order of a request. Spans of an RPC's server and client are named by its method, such as
# "headrace.v1.GenerationService/Generate", as the RPC conventions require.
SPAN_SCORE = "router.score"
SPAN_CHECK = "router.check"
SPAN_TOKENIZE = "batcher.tokenize"
SPAN_QUEUE = "batcher.queue"
SPAN_BATCH = "batcher.batch"
SPAN_PREFILL = "worker.prefill"
SPAN_DECODE = "worker.decode"

EVENT_FIRST_TOKEN = "first_token"
EVENT_FINISH = "finish"
EVENT_FAILOVER = "failover"

# RPC semantic conventions (stable).
RPC_SYSTEM = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS_CODE = "rpc.status_code"
ERROR_TYPE = "error.type"
METRIC_SERVER_CALL_DURATION = "rpc.server.call.duration"
METRIC_CLIENT_CALL_DURATION = "rpc.client.call.duration"

# GenAI semantic conventions (development).
GEN_AI_OPERATION = "gen_ai.operation.name"
GEN_AI_PROVIDER = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_TEMPERATURE = "gen_ai.request.temperature"
GEN_AI_FINISH_REASONS = "gen_ai.response.finish_reasons"
GEN_AI_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
GEN_AI_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
METRIC_TTFT = "gen_ai.server.time_to_first_token"
METRIC_TPOT = "gen_ai.server.time_per_output_token"
METRIC_REQUEST_DURATION = "gen_ai.server.request.duration"

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
TENANT_CLASS = "headrace.tenant.class"
QUOTA_LIMIT = "headrace.quota.limit"
QUOTA_MODE = "headrace.quota.mode"
METRIC_TOKENS = "headrace.generated_tokens"
METRIC_TOKEN_RATE = "headrace.tokens_per_second"
METRIC_REQUESTS = "headrace.requests"
METRIC_QUEUE_DEPTH = "headrace.queue.depth"
METRIC_QUEUE_WAIT = "headrace.queue.wait"
METRIC_BATCH_SIZE = "headrace.batch.size"
METRIC_RUNNING = "headrace.sequences.running"
METRIC_WAITING = "headrace.sequences.waiting"
METRIC_ENDED = "headrace.sequences.ended"
METRIC_PAUSED = "headrace.sequences.paused"
METRIC_PREEMPTIONS = "headrace.sequences.preempted"
METRIC_KV_USAGE = "headrace.kv.usage"
METRIC_CACHED_TOKENS = "headrace.kv.cached_tokens"
METRIC_STEP_ROWS = "headrace.step.rows"
METRIC_STEP_SECONDS = "headrace.step.duration"
METRIC_FAILOVERS = "headrace.failovers"
METRIC_ROUTED = "headrace.routed"
METRIC_DRAFTS = "headrace.drafts"
METRIC_BILLED_TOKENS = "headrace.billed_tokens"
METRIC_COST = "headrace.cost"
METRIC_LARGEST_COST = "headrace.largest_tier_cost"
METRIC_FEEDBACK = "headrace.feedback"
METRIC_QUOTA_REFUSALS = "headrace.quota.refusals"

# Bucket boundaries from the conventions, in seconds, except for BUCKETS_SIZE.
BUCKETS_CALL = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
BUCKETS_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
BUCKETS_TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
BUCKETS_SIZE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
