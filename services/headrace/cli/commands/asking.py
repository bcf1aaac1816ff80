"""Commands that call a running mesh."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cli.calls.connection import Connection
from headrace.cli.commands.flags import Aim, Artifact, with_connection
from headrace.cli.complaints import complain, complaining


@with_connection
def chat(
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt. Default: standard input, or a conversation if that is a terminal."),
    ] = None,
    connection: Connection,
    tier: Annotated[str, typer.Option(help="Answer on this tier only.")] = "",
    min_tier: Annotated[str, typer.Option(help="The smallest tier that may answer.")] = "",
    max_tier: Annotated[str, typer.Option(help="The largest tier that may answer.")] = "",
    temperature: Annotated[
        float,
        typer.Option(min=0, max=10, help="0 always takes the most likely token; higher values vary more."),
    ] = 0.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of tokens of an answer.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes a sampled answer reproducible.")] = None,
    system: Annotated[str, typer.Option(help="Replaces the model's system prompt.")] = "",
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The answer is JSON that matches the JSON schema in this file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The answer is a JSON object.")] = False,
    regex: Annotated[
        str, typer.Option(metavar="PATTERN", help="The answer matches this regular expression as a whole.")
    ] = "",
    tools: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Tools that the model may call: a JSON list of objects with name, description and "
            "parameters, or as in requests of OpenAI's API. Calls are printed, not made.",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a whole answer.")] = 120.0,
) -> None:
    """Send a prompt and stream the answer. Without a prompt, start a conversation; /help lists its commands.

    Figures and the ids of request and answer, for `headrace feedback`, are printed on standard error.

    Example:  headrace chat --max-tokens 60 "Why is the sky blue?"

    Example:  git diff | headrace chat --system "Write a commit message." --min-tier large

    Example:  headrace chat --regex "yes|no" "Is Paris in France?"
    """
    import asyncio

    from headrace.cli.calls.chat import ChatOptions, ask_once
    from headrace.cli.calls.conversation import conversation
    from headrace.cli.files.forms import read_schema, read_tools

    if sum([json_schema is not None, as_json, bool(regex)]) > 1:
        complain("give at most one of --json-schema, --json and --regex")
        raise typer.Exit(2)
    with complaining(connection.target):
        options = ChatOptions(
            connection=connection,
            timeout=timeout,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            json_schema=None if json_schema is None else read_schema(json_schema),
            json_object=as_json or None,
            regex=regex or None,
            tools=() if tools is None else read_tools(tools),
            system=system,
            tier=tier,
            min_tier=min_tier,
            max_tier=max_tier,
        )
        if prompt is None and sys.stdin.isatty():
            if options.tools:
                complain("--tools needs a prompt: a conversation cannot send results of calls")
                raise typer.Exit(2)
            conversation(options)
            return
        # Invalid UTF-8 is rejected later, as it is in an argument.
        text = sys.stdin.buffer.read().decode(errors="surrogateescape") if prompt is None else prompt
        if not text.strip():
            complain("the prompt is empty; give it as an argument or on standard input")
            raise typer.Exit(2)
        asyncio.run(ask_once(text, options))


@with_connection
def explain(
    *,
    prompt: Annotated[str | None, typer.Argument(help="The prompt to explain.")] = None,
    connection: Connection,
    as_json: Annotated[bool, typer.Option("--json", help="Print the response as JSON.")] = False,
    jsonl: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Score JSON Lines with id, and prompt or messages, without a mesh; - is standard input.",
        ),
    ] = "",
    artifact: Artifact = None,
    objective: Aim = "both",
    tier_names: Annotated[
        str,
        typer.Option(
            "--tiers", help="With --jsonl: names of the tiers, smallest first, separated by commas."
        ),
    ] = "small,large",
    from_score: Annotated[
        str, typer.Option("--thresholds", help="With --jsonl: the lowest score of each tier after the first.")
    ] = "",
) -> None:
    """Show the tier that a prompt would be routed to, and why. Nothing is generated.

    Example:  headrace explain "Prove that there are infinitely many primes."

    Example:  headrace explain --jsonl prompts.jsonl --thresholds 0.6
    """
    if (prompt is None) == (not jsonl):
        complain("give either a prompt, or a file of prompts with --jsonl")
        raise typer.Exit(2)
    if jsonl:
        from headrace.cli.files.offline import print_scores

        with complaining():
            print_scores(jsonl, artifact, tier_names, from_score, objective)
        return
    if artifact is not None or objective != "both" or tier_names != "small,large" or from_score:
        complain("--artifact, --objective, --tiers and --thresholds need --jsonl; a mesh uses its router's")
        raise typer.Exit(2)
    import asyncio

    from headrace.cli.calls.routing import as_dict, call_explain, explanation

    with complaining(connection.target):
        response = asyncio.run(call_explain(connection, prompt or ""))
    if as_json:
        print(json.dumps(as_dict(response), indent=2, ensure_ascii=False))
        return
    console = Console()
    for part in explanation(response):
        console.print(part)


@with_connection
def tiers(
    *,
    connection: Connection,
    as_json: Annotated[bool, typer.Option("--json", help="Print the response as JSON.")] = False,
) -> None:
    """List the tiers with their models, health and load.

    Example:  headrace tiers --target router.example:50051
    """
    import asyncio

    from headrace.cli.calls.routing import as_dict, call_list_tiers, tiers_table

    with complaining(connection.target):
        response = asyncio.run(call_list_tiers(connection))
    if as_json:
        print(json.dumps(as_dict(response), indent=2, ensure_ascii=False))
    else:
        Console().print(tiers_table(response.tiers))


@with_connection
def top(
    *,
    connection: Connection,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between updates.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print once and exit.")] = False,
) -> None:
    """Show load, times, batch fill, failovers and cost per tier, and tenants, updated continuously.

    A canary, shadow answers and the decision log are shown if the router uses them.

    Percentiles and batch fill are of the last minute, with --once since the start. Tenants are shown to
    callers with the scope admin.

    Costs need prices:  HEADRACE_PRICES=small=0.05/0.10,large=0.50/1.50 headrace up

    Example:  headrace top
    """
    from headrace.cli.calls.top import top as run
    from headrace.cli.launch.up import run_until_signal

    console = Console()
    with complaining(connection.target):
        run_until_signal(run(connection, console, interval=interval, once=once), lambda: None)


@with_connection
def feedback(
    *,
    answer_id: Annotated[str, typer.Argument(help="Id of the answer, as `headrace chat` prints it.")] = "",
    request_id: Annotated[
        str, typer.Option(help="Id of the request, instead; rejected if several answers have it.")
    ] = "",
    ok: Annotated[
        bool | None, typer.Option("--ok/--not-ok", help="Whether the answer was good enough.")
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Instead of --ok, the quality of the answer from 0 to 1."),
    ] = None,
    tier: Annotated[str, typer.Option(help="The tier that answered; a mismatch is rejected.")] = "",
    tenant: Annotated[str, typer.Option(help="Tenant of the request, if it had one.")] = "",
    connection: Connection,
) -> None:
    """Send the quality of an answer to the router, which keeps it if it was started with --feedback FILE.

    In a conversation of `headrace chat`, /good and /bad rate the last answer.

    Example:  headrace feedback 7d1c... --not-ok
    """
    import asyncio

    from headrace.cli.calls.routing import feedback_result, send_feedback

    if (ok is None) == (quality is None):
        complain("give one of --ok, --not-ok and --quality")
        raise typer.Exit(2)
    if not (answer_id or request_id):
        complain("give the id of the answer, or --request-id")
        raise typer.Exit(2)
    with complaining(connection.target):
        response = asyncio.run(
            send_feedback(connection, answer_id, request_id, ok=ok, quality=quality, tier=tier, tenant=tenant)
        )
    Console().print(feedback_result(response), highlight=False, markup=False)
