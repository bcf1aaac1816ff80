"""The `headrace` command: what can be asked of it, and with which flags.

Each command reads its flags here and hands over to the module of its name.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from headrace import models
from headrace.cli.complaints import complain, complaining
from headrace.cli.mesh import DEFAULT_TIERS, MeshSpec, parse_tiers
from headrace.cli.processes import log_folder
from headrace.cli.up import DEFAULT_PORT, DEFAULT_TARGET

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""A gRPC mesh for LLM inference, on this machine or another.

    Bring one up:  [bold]headrace up[/]   (add --fake to try it without any model)

    Then, in another terminal:  [bold]headrace chat "Why is the sky blue?"[/]""",
)

Target = Annotated[
    str, typer.Option(envvar="HEADRACE_TARGET", help="Router or batcher to ask, as a gRPC target.")
]
Fake = Annotated[bool, typer.Option("--fake", help="Echo engines instead of models: nothing to download.")]
Tiers = Annotated[
    list[str] | None,
    typer.Option(
        "--tier",
        metavar="NAME=MODEL",
        help="A tier, smallest first; repeat it for more. MODEL is a default's name, a folder, a .gguf "
        f"file or a hub id. Default: {' '.join(f'{tier.name}={tier.model}' for tier in DEFAULT_TIERS)}",
    ),
]
Device = Annotated[str, typer.Option(help="Where models run: cpu, cuda or cuda:N.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of weights and activations.")
]
Threads = Annotated[
    int, typer.Option(min=0, help="CPU threads per worker; 0 shares the cores out between them.")
]
LogDir = Annotated[
    Path | None, typer.Option(help="Folder for the processes' logs. Default: a new one in the cache.")
]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder for fetched models. Default: $HEADRACE_CACHE or ~/.cache/headrace."),
]
Artifact = Annotated[Path | None, typer.Option(help="A model file in place of the one that is shipped.")]
DrainSeconds = Annotated[
    float, typer.Option(min=0, help="How long requests in flight may go on when the mesh stops.")
]


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which; all defaults if none is given.")
    ] = None,
    cache: Cache = None,
) -> None:
    """Download models, check them, and keep them for later.

    Example:  headrace fetch smollm2-135m-instruct
    """
    from headrace.cli.up import fetch_models

    console = Console()
    with complaining():
        paths = fetch_models(names or list(models.DEFAULTS), cache or models.cache_folder(), console)
    for name, path in paths.items():
        console.print(f"{name}: {path}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def up(
    fake: Fake = False,
    tier: Tiers = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the router; 0 picks a free one.")] = (
        DEFAULT_PORT
    ),
    device: Device = "",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    log_dir: LogDir = None,
    cache: Cache = None,
    drain_seconds: DrainSeconds = 10.0,
) -> None:
    """Start a mesh on this machine: a worker and a batcher per tier, and the router. Ctrl-C stops it.

    Example:  headrace up --fake

    Example:  headrace up --tier small=smollm2-135m-instruct --tier large=Qwen/Qwen2.5-1.5B-Instruct
    """
    from headrace.cli.up import prepare, run_until_signal
    from headrace.cli.up import up as run

    console = Console()
    with complaining():
        home = cache or models.cache_folder()
        spec = MeshSpec(
            cache=home,
            log_dir=log_dir or log_folder(home),
            tiers=parse_tiers(tier or [], fake=fake),
            fake=fake,
            port=port,
            device=device,
            dtype=dtype,
            threads=threads,
            drain_seconds=drain_seconds,
        )
        prepare(spec, console)
        run_until_signal(run(spec, console), lambda: console.print("stopping..."))


@app.command()
def demo(
    fake: Fake = False,
    tier: Tiers = None,
    device: Device = "",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    log_dir: LogDir = None,
    cache: Cache = None,
) -> None:
    """Bring a mesh up, ask it sixteen things, show figures and a trace, and take it down again.

    Example:  headrace demo --fake
    """
    from headrace.cli.demo import demo as run
    from headrace.cli.up import prepare, run_until_signal

    console = Console()
    finished = False

    async def note(spec: MeshSpec) -> None:
        nonlocal finished
        finished = await run(spec, console)

    with complaining():
        home = cache or models.cache_folder()
        spec = MeshSpec(
            cache=home,
            log_dir=log_dir or log_folder(home),
            tiers=parse_tiers(tier or [], fake=fake),
            fake=fake,
            device=device,
            dtype=dtype,
            threads=threads,
        )
        prepare(spec, console)
        run_until_signal(note(spec), lambda: console.print("stopping..."))
    if not finished:
        raise typer.Exit(1)


@app.command()
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
        text = sys.stdin.read() if prompt is None else prompt
        if not text.strip():
            complain("the prompt is empty; give it as an argument or on standard input")
            raise typer.Exit(2)
        asyncio.run(once(text, wishes))


@app.command()
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


@app.command()
def check(
    jsonl: Annotated[
        str, typer.Option(metavar="FILE", help="Rows of id, prompt and draft; - is standard input.")
    ],
    artifact: Artifact = None,
) -> None:
    """Judge drafted answers; no mesh is needed. The higher the score, the more a larger tier is needed.

    Rows may also say "finished" (did the model end by itself?) and "logprobs" (of the draft's tokens).

    Example:  headrace check --jsonl drafts.jsonl
    """
    from headrace.cli.offline import print_checks

    with complaining():
        print_checks(jsonl, artifact)


@app.command()
def train(
    rows: Annotated[
        str,
        typer.Argument(metavar="ROWS", help="Rows of prompt, small_ok and large_ok; - is standard input."),
    ],
    out: Annotated[Path, typer.Option(help="Where to write the refitted artifact, for a router's --scorer.")],
    tiers: Annotated[
        str, typer.Option(help="The smaller and the larger tier: NAME_ok is read.")
    ] = "small,large",
    artifact: Artifact = None,
) -> None:
    """Refit the router's score to outcomes of your own: how each tier answered, 0 (badly) to 1 (well).

    A tier may have its say in a row of its own, as in the router's --feedback file: prompts are joined.
    Two hundred prompts bring most of what can be had. What is shipped stays the prior, against harm by few.

    Example:  headrace train outcomes.jsonl --out scorer.json
    """
    from headrace.cli.offline import refit_and_tell

    with complaining():
        refit_and_tell(rows, out, tiers, artifact, Console(highlight=False))


@app.command()
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


@app.command()
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


@app.command()
def feedback(
    request_id: Annotated[str, typer.Argument(help="Of the answer, as `headrace chat` shows it.")],
    ok: Annotated[bool | None, typer.Option("--ok/--not-ok", help="Whether it was good enough.")] = None,
    quality: Annotated[
        float | None, typer.Option(min=0, max=1, help="Instead of that, how good: 0 to 1.")
    ] = None,
    tier: Annotated[str, typer.Option(help="Whose answer is meant, if not the one that was given.")] = "",
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
        said = asyncio.run(tell(target, request_id, ok=ok, quality=quality, tier=tier))
    Console().print(booked(said), highlight=False, markup=False)


@app.command()
def calibrate(
    traffic: Annotated[
        Path,
        typer.Argument(help='Rows of JSON with "prompt", and "small_ok", "large_ok" if there are labels.'),
    ],
    share: Annotated[
        str, typer.Option(help="Wanted share of calls, 0 to 1, per tier after the first: 0.3 or 0.2,0.1.")
    ] = "",
    quality: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Instead of that, how much of the gap between smallest and largest tier to keep.",
        ),
    ] = None,
    tiers: Annotated[str, typer.Option(help="Names, smallest first.")] = "small,large",
    costs: Annotated[
        str,
        typer.Option(help="What a call costs per tier, in any unit. Default: each tier ten times the last."),
    ] = "",
    out: Annotated[Path, typer.Option(help="The file for the router.")] = Path("calibration.json"),
    png: Annotated[Path | None, typer.Option(help="Draw the trade-off into this file.")] = None,
    artifact: Artifact = None,
) -> None:
    """Turn your own traffic into thresholds, for a wanted share of large calls or a wanted quality.

    Example:  headrace calibrate traffic.jsonl --share 0.3

    Example:  headrace calibrate labelled.jsonl --quality 0.9 --png curve.png
    """
    from headrace.calibration import BadCalibration
    from headrace.cli.calibrate import calibrate as run
    from headrace.router.artifact import BadArtifact

    names = [name.strip() for name in tiers.split(",")]
    try:
        shares = [float(part) for part in share.split(",")] if share else None
        prices = (
            [float(part) for part in costs.split(",")] if costs else [10.0**at for at in range(len(names))]
        )
    except ValueError:
        complain("--share and --costs are numbers with commas between them")
        raise typer.Exit(2) from None
    if (shares is None) == (quality is None):
        complain("say either --share or --quality")
        raise typer.Exit(2)
    if len(names) < 2 or not all(names) or len(prices) != len(names) or min(prices) < 0 or not prices[-1]:
        complain("--tiers names at least two tiers, and --costs has one number for each, the last above 0")
        raise typer.Exit(2)
    try:
        run(
            traffic,
            tiers=names,
            costs=prices,
            shares=shares,
            quality=quality,
            out=out,
            png=png,
            artifact=artifact,
            console=Console(),
        )
    except (BadArtifact, BadCalibration, OSError) as error:
        complain(str(error))
        raise typer.Exit(2) from None


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
