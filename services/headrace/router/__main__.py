"""Start a router: `python -m headrace.router --help`."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext

import grpc

from headrace.channel import open_channel
from headrace.client import LIST_TIERS
from headrace.multiplex.serving import METHOD as MULTIPLEX
from headrace.router.admin import AdminServicer
from headrace.router.changes.answered import Watchers
from headrace.router.changes.canary import Canary
from headrace.router.changes.decision_log import DecisionLog
from headrace.router.changes.scorer_files import ScorerFiles
from headrace.router.changes.scorers import Scorers
from headrace.router.changes.spending import Spending
from headrace.router.changes.status import Status
from headrace.router.chooser import Chooser
from headrace.router.costs.weighing import Weighing
from headrace.router.figures import Figures
from headrace.router.quotas.admission import Quotas
from headrace.router.quotas.limits import BadQuotas, Rules
from headrace.router.quotas.service import LEASE, QuotaServicer
from headrace.router.quotas.service import SERVICES as QUOTA_SERVICES
from headrace.router.service import SERVICES, RouterServicer
from headrace.router.settings import Settings
from headrace.router.shadow.setup import create_shadow
from headrace.router.shadow.shadow import Shadow
from headrace.router.siblings import SharedConversations, Siblings, inboxes
from headrace.router.state.feedback import TENANT_SHARE, Feedback
from headrace.router.state.thresholds import Thresholds
from headrace.router.state.tiers import Tiers
from headrace.router.tokenizer_service import SERVICES as TOKENIZER_SERVICES
from headrace.router.tokenizer_service import TokenizerServicer
from headrace.routing.artifact import BadArtifact
from headrace.routing.calibration import BadCalibration
from headrace.routing.drafts import check as draft_check
from headrace.routing.drafts.check import DraftChecker
from headrace.routing.drafts.rules import CascadeRules
from headrace.routing.scoring.conversation import Turn
from headrace.runtime import process_info
from headrace.runtime.security_setup import security
from headrace.runtime.serving.calls import Calls
from headrace.runtime.serving.memory_reclaim import freeze_loaded_objects
from headrace.runtime.serving.processes import prefork
from headrace.runtime.serving.server import Serving, StartFailed, run, serving, until_signal
from headrace.runtime.telemetry import logs
from headrace.runtime.telemetry.scraping import scraping
from headrace.runtime.telemetry.setup import telemetry
from headrace.tls.files import TlsReader
from headrace.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from headrace.v1.generation_service_pb2_grpc import add_GenerationServiceServicer_to_server
from headrace.v1.quota_service_pb2_grpc import add_QuotaServiceServicer_to_server
from headrace.v1.routing_service_pb2_grpc import add_RoutingServiceServicer_to_server
from headrace.v1.tokenizer_service_pb2_grpc import add_TokenizerServiceServicer_to_server

log = logging.getLogger(__name__)


@asynccontextmanager
async def router(settings: Settings, siblings: Siblings | None = None) -> AsyncGenerator[Serving, None]:
    """Serve the mesh while the block runs; drain when it is left.

    siblings   the other processes that listen on the port of *settings*; by default there are none
    """
    siblings = siblings or Siblings()
    secured = security(settings, "router")
    tiers = Tiers(
        settings.tier_targets(),
        poll_seconds=settings.poll_seconds,
        stall_seconds=settings.stall_seconds,
        wait_seconds=settings.tier_wait_seconds,
        tls=secured.calls,
    )
    checker, thresholds, scorers, canary = _load_models(settings, siblings)
    weighing = _load_weighing(settings, scorers, siblings)
    conversations = SharedConversations(siblings, idle_seconds=settings.session_idle_seconds)
    chooser = Chooser(
        tiers,
        thresholds,
        checker,
        prices=settings.tier_prices(),
        conversations=conversations,
        rules=_cascade_rules(settings),
        weighing=weighing,
        explore=settings.explore,
    )
    quotas = _load_quotas(settings, tiers, siblings, secured.calls)
    calls = Calls(settings.limits, trace_context=settings.trace_context, guard=secured.guard)
    figures = Figures([tier.name for tier in tiers.tiers], siblings)
    decisions = _open_decision_log(settings)
    spending = Spending(weighing.spend) if weighing is not None else None
    feedback = _open_feedback(settings)
    watchers = Watchers([watcher for watcher in (decisions, canary, spending) if watcher is not None])
    shadow = _load_shadow(settings, tiers, checker, feedback, watchers, weighing)
    status = Status(scorers, canary, siblings)
    servicer = RouterServicer(
        tiers,
        scorers,
        chooser,
        feedback,
        calls,
        siblings,
        figures,
        status,
        default_deadline=settings.default_deadline,
        failover_seconds=settings.failover_seconds,
        tenants=settings.metrics_tenants,
        quotas=quotas,
        watchers=watchers,
        shadow_bill=None if shadow is None else shadow.own.total,
    )
    admin = AdminServicer(tiers, conversations, calls.requests, figures, status)

    tokenizers = TokenizerServicer(tiers, quotas=quotas)

    def register(server: grpc.aio.Server) -> None:
        add_GenerationServiceServicer_to_server(servicer, server)
        add_RoutingServiceServicer_to_server(servicer, server)
        add_TokenizerServiceServicer_to_server(tokenizers, server)
        add_AdminServiceServicer_to_server(admin, server)
        if quotas is not None and settings.quota_peers:
            add_QuotaServiceServicer_to_server(QuotaServicer(quotas.sharing), server)

    async with (
        tiers.watching(),
        siblings.listening(),
        quotas.running(settings.poll_seconds) if quotas is not None else nullcontext(),
        decisions.running() if decisions is not None else nullcontext(),
        asyncio.TaskGroup() as tasks,
        serving(
            register,
            (
                *SERVICES,
                *TOKENIZER_SERVICES,
                *process_info.SERVICES,
                *(QUOTA_SERVICES if settings.quota_peers else ()),
            ),
            host=settings.host,
            port=settings.port,
            health_port=settings.health_port,
            mtls_port=settings.mtls_port,
            tls=secured.server,
            share_port=settings.processes > 1,
            drain_seconds=settings.drain_seconds,
            calls=calls,
            untracked=frozenset({MULTIPLEX, process_info.INSPECT, LIST_TIERS, LEASE}),
            ready=lambda: tiers.any_healthy,
        ) as server,
        # Left first: a drain does not wait for answers that nobody receives.
        shadow.running() if shadow is not None else nullcontext(),
    ):
        watching = [tasks.create_task(scorers.watch(settings.poll_seconds))]
        if canary is not None:
            watching.append(tasks.create_task(canary.watch(settings.poll_seconds)))
        try:
            yield server
        finally:
            for task in watching:
                task.cancel()


def _load_models(
    settings: Settings, siblings: Siblings
) -> tuple[DraftChecker, Thresholds, Scorers, Canary | None]:
    """Load draft check, scorers and calibrations. Raises StartFailed."""
    if settings.thresholds.strip() and (settings.calibration is not None or settings.tier_shares()):
        log.warning("--thresholds is ignored: --calibration or --share sets them")
    names = [name for name, _ in settings.tier_targets()]
    shares = settings.tier_shares()
    candidate = canary = None
    try:
        checker = draft_check.load(settings.draft_check)
        control = ScorerFiles(
            settings.scorer,
            settings.calibration,
            tiers=names,
            shares=bool(shares),
            objective=settings.objective,
            by_success=settings.needs_outcomes,
        )
        if (wanted := settings.canary_scorer()) is not None:
            path, share = wanted
            candidate = ScorerFiles(
                path,
                settings.canary_calibration,
                tiers=names,
                shares=bool(shares),
                objective=settings.objective,
                by_success=settings.needs_outcomes,
            )
            canary = Canary(share, siblings, cost_limit=settings.canary_cost)
    except (BadArtifact, BadCalibration) as error:
        raise StartFailed(str(error)) from error
    thresholds = Thresholds(settings.tier_thresholds(), shares=shares)
    return checker, thresholds, Scorers(control, thresholds, candidate=candidate, canary=canary), canary


def _load_weighing(settings: Settings, scorers: Scorers, siblings: Siblings) -> Weighing | None:
    """Return how expected quality and cost are weighed; None to choose by score."""
    if not settings.chooses_by_success:
        return None
    tiers = [name for name, _ in settings.tier_targets()]
    estimated = scorers.score_turns([Turn("user", "")]).estimates
    if estimated and (missing := [tier for tier in tiers if tier not in estimated]):
        log.warning(
            "tiers are chosen by score: the scorer has no outcomes of some of them",
            extra={"missing": ", ".join(missing)},
        )
    return Weighing(
        tiers,
        settings.tier_prices(),
        cost_weight=settings.cost_weight,
        per_day=settings.budget_per_day,
        siblings=siblings,
    )


def _open_feedback(settings: Settings) -> Feedback:
    """Open the feedback file. Raises StartFailed."""
    try:
        return Feedback(
            settings.feedback,
            max_bytes=int(settings.feedback_megabytes * 1e6),
            per_minute=settings.feedback_per_minute,
            share=TENANT_SHARE,
        )
    except OSError as error:
        raise StartFailed(f"--feedback {settings.feedback} cannot be written: {error.strerror}") from error


def _open_decision_log(settings: Settings) -> DecisionLog | None:
    """Open the file of decisions. Raises StartFailed."""
    if settings.decision_log is None:
        return None
    try:
        return DecisionLog(
            settings.decision_log,
            max_bytes=int(settings.decision_log_megabytes * 1e6),
            text=settings.decision_log_text,
        )
    except OSError as error:
        raise StartFailed(
            f"--decision-log {settings.decision_log} cannot be written: {error.strerror}"
        ) from error


def _load_shadow(
    settings: Settings,
    tiers: Tiers,
    checker: DraftChecker,
    feedback: Feedback,
    watchers: Watchers,
    weighing: Weighing | None,
) -> Shadow | None:
    """Create the shadow, if there is one. Raises StartFailed."""
    try:
        return create_shadow(settings, tiers, checker, feedback, watchers, weighing)
    except (BadArtifact, BadCalibration) as error:
        raise StartFailed(str(error)) from error


def _load_quotas(
    settings: Settings, tiers: Tiers, siblings: Siblings, tls: TlsReader | None
) -> Quotas | None:
    """Load the limits of tenants. Raises StartFailed."""
    if settings.quotas is None:
        return None
    try:
        rules = Rules(settings.quotas)
    except BadQuotas as error:
        raise StartFailed(str(error)) from error
    return Quotas(
        rules,
        shadow=settings.quotas_shadow,
        prices=settings.tier_prices().values(),
        most_tokens=lambda: max(tier.reported.limits.max_tokens for tier in tiers.tiers),
        targets=settings.quota_targets(),
        processes=settings.processes,
        siblings=siblings,
        open_channel=lambda address, name: open_channel(address, tls=tls, server_name=name, direct=True),
    )


def _cascade_rules(settings: Settings) -> CascadeRules:
    return CascadeRules(
        enabled=settings.cascade,
        min_score=settings.cascade_min_score,
        min_quality=settings.cascade_min_quality,
        draft_tokens=settings.cascade_draft_tokens,
        sample_seconds=settings.cascade_sample_seconds,
    )


async def main(settings: Settings, siblings: Siblings | None = None) -> None:
    """Serve until a signal is received."""
    identity = f"{socket.gethostname()}-{os.getpid()}"
    # Each of several processes has an endpoint of its own, because each has metrics of its own.
    port = settings.metrics_port and settings.metrics_port + (siblings.number if siblings is not None else 0)
    async with (
        telemetry("router", instance=identity),
        scraping(settings.metrics_host, port, "router", identity),
        router(settings, siblings),
    ):
        await until_signal()


def start(settings: Settings) -> None:
    """Run a router with one process or several, until a signal is received."""
    if settings.processes == 1:
        run(main(settings), texts=True)
        return
    freeze_loaded_objects()  # so that collections do not unshare their memory
    mail = inboxes(settings.processes)
    number, port = prefork(settings.processes, settings.host, settings.port)
    run(main(settings.model_copy(update={"port": port}), Siblings(number, mail)), texts=True)


if __name__ == "__main__":
    settings = Settings.load(program="python -m headrace.router")
    logs.configure("router", settings.log_level)
    start(settings)
