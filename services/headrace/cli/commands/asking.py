"""Commands that ask a running mesh."""

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from headrace.cli.commands.flags import Artifact, Target
from headrace.cli.complaints import complain, complaining
from headrace.cli.up import DEFAULT_TARGET


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask. None: standard input, or a conversation on a terminal.")
    ] = None,
    target: Target = DEFAULT_TARGET,
    tier: Annotated[str, typer.Option(help="Answer on this tier and no other.")] = "",
    min_tier: Annotated[str, typer.Option(help="Not below this tier.")] = "",
    max_tier: Annotated[str, typer.Option(help="Not above this tier.")] = "",
    temperature: Annotated[
        float, typer.Option(min=0, max=10, help="0 takes the likeliest token always; more is more varied.")
    ] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes a sampled answer repeatable.")] = None,
    system: Annotated[str, typer.Option(help="Replaces the model's system prompt.")] = "",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a whole answer.")] = 120.0,
) -> None:
    """Ask something and watch the answer come. Without a prompt, talk: /help says what may be said.

    What comes after the answer is on standard error; the request's id there is for `headrace feedback`.

    Example:  headrace chat --max-tokens 60 "Why is the sky blue?"

    Example:  git diff | headrace chat --system "Write a commit message." --min-tier large
    """
    import asyncio

    from headrace.cli.chat import Wishes, once
    from headrace.cli.conversation import conversation

    wishes = Wishes(
        target=target,
        timeout=timeout,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        system=system,
        tier=tier,
        min_tier=min_tier,
        max_tier=max_tier,
    )
    with complaining(target):
        if prompt is None and sys.stdin.isatty():
            conversation(wishes)
            return
        # Bytes that are no UTF-8 are refused with the prompt, as they are in an argument.
        text = sys.stdin.buffer.read().decode(errors="surrogateescape") if prompt is None else prompt
        if not text.strip():
            complain("the prompt is empty; give it as an argument or on standard input")
            raise typer.Exit(2)
        asyncio.run(once(text, wishes))


def explain(
    prompt: Annotated[str | None, typer.Argument(help="What would be asked.")] = None,
    target: Target = DEFAULT_TARGET,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    jsonl: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Score rows of id and prompt, without a mesh; - is standard input."
        ),
    ] = "",
    artifact: Artifact = None,
    tier_names: Annotated[
        str, typer.Option("--tiers", help="With --jsonl: names of the tiers, smallest first, with commas.")
    ] = "small,large",
    from_score: Annotated[
        str, typer.Option("--thresholds", help="With --jsonl: the lowest score of each tier after the first.")
    ] = "",
) -> None:
    """Show which tier a prompt would go to, and why. Nothing is generated.

    Example:  headrace explain "Prove that there are infinitely many primes."

    Example:  headrace explain --jsonl prompts.jsonl --thresholds 0.6
    """
    if (prompt is None) == (not jsonl):
        complain("give a prompt, or a file of them with --jsonl")
        raise typer.Exit(2)
    if jsonl:
        from headrace.cli.offline import print_scores

        with complaining():
            print_scores(jsonl, artifact, tier_names, from_score)
        return
    import asyncio

    from headrace.cli.routing import as_dict, ask_explain, explained

    with complaining(target):
        response = asyncio.run(ask_explain(target, prompt or ""))
    if as_json:
        print(json.dumps(as_dict(response), indent=2, ensure_ascii=False))
        return
    console = Console()
    for part in explained(response):
        console.print(part)


def tiers(
    target: Target = DEFAULT_TARGET,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """List the tiers with their models, health and load.

    Example:  headrace tiers --target router.example:50051
    """
    import asyncio

    from headrace.cli.routing import as_dict, ask_tiers, tiers_table

    with complaining(target):
        response = asyncio.run(ask_tiers(target))
    if as_json:
        print(json.dumps(as_dict(response), indent=2, ensure_ascii=False))
    else:
        Console().print(tiers_table(response.tiers))


def top(
    target: Target = DEFAULT_TARGET,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
) -> None:
    """Watch the mesh work: load, tokens per second, the tiers' shares, waste, cost and what was saved.

    Costs need prices:  HEADRACE_PRICES=small=0.05/0.10,large=0.50/1.50 headrace up

    Example:  headrace top
    """
    from headrace.cli.top import top as run
    from headrace.cli.up import run_until_signal

    console = Console()
    with complaining(target):
        run_until_signal(run(target, console, interval=interval, once=once), lambda: None)


def feedback(
    request_id: Annotated[str, typer.Argument(help="Of the answer, as `headrace chat` shows it.")],
    ok: Annotated[bool | None, typer.Option("--ok/--not-ok", help="Whether it was good enough.")] = None,
    quality: Annotated[
        float | None, typer.Option(min=0, max=1, help="Instead of that, how good: 0 to 1.")
    ] = None,
    tier: Annotated[str, typer.Option(help="The tier that answered, to make sure.")] = "",
    tenant: Annotated[str, typer.Option(help="The tenant of the request, if it had one.")] = "",
    target: Target = DEFAULT_TARGET,
) -> None:
    """Tell the router how good an answer was; started with --feedback FILE, it keeps that to learn from.

    In a conversation of `headrace chat`, /good and /bad do the same for the last answer.

    Example:  headrace feedback 7d1c... --not-ok
    """
    import asyncio

    from headrace.cli.routing import booked, tell

    if (ok is None) == (quality is None):
        complain("say either --ok, --not-ok or --quality")
        raise typer.Exit(2)
    with complaining(target):
        said = asyncio.run(tell(target, request_id, ok=ok, quality=quality, tier=tier, tenant=tenant))
    Console().print(booked(said), highlight=False, markup=False)
