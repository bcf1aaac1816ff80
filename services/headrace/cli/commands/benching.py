"""The command that measures a mesh, or a server with OpenAI's API, under load."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from headrace.cli.calls.connection import Connection
from headrace.cli.commands.flags import with_connection
from headrace.cli.complaints import complain, complaining
from headrace.cli.launch.up import DEFAULT_TARGET

_OPENAI, _PROMPTS, _LOAD, _RESULT = "OpenAI's API", "Prompts", "Load", "Result"


@with_connection
def bench(
    *,
    connection: Connection,
    tier: Annotated[str, typer.Option(help="Use this tier of the mesh only.")] = "",
    model: Annotated[
        str, typer.Option(help="Use this model only. Default: any of a mesh; the first one that --url lists.")
    ] = "",
    url: Annotated[
        str,
        typer.Option(
            metavar="URL",
            rich_help_panel=_OPENAI,
            help="Measure this server over HTTP instead of --target: http://127.0.0.1:8080/v1.",
        ),
    ] = "",
    api_key: Annotated[
        str,
        typer.Option(
            envvar="OPENAI_API_KEY",
            show_envvar=True,
            rich_help_panel=_OPENAI,
            help="Key for --url. Other users of this machine can see options, but not variables.",
        ),
    ] = "",
    header: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:VALUE", rich_help_panel=_OPENAI, help="Header of each request; repeat it for more."
        ),
    ] = None,
    extra_body: Annotated[
        str,
        typer.Option(
            metavar="JSON",
            rich_help_panel=_OPENAI,
            help="Object that is merged into each request; null removes a field.",
        ),
    ] = "",
    endpoint: Annotated[
        Literal["chat", "completions"],
        typer.Option(help="Send conversations, or raw text to continue without a chat template."),
    ] = "chat",
    prompts: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_PROMPTS,
            help="JSON Lines with prompt or messages, and optionally max_tokens or output_len (exact); - is "
            "standard input. Default: 64 built-in prompts.",
        ),
    ] = "",
    input_len: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=_PROMPTS, help="Send synthetic prompts with about this many tokens."
        ),
    ] = None,
    prefix_len: Annotated[
        int,
        typer.Option(
            min=0, rich_help_panel=_PROMPTS, help="Tokens before these that all synthetic prompts share."
        ),
    ] = 0,
    range_ratio: Annotated[
        float,
        typer.Option(
            min=0, max=0.99, rich_help_panel=_PROMPTS, help="By how much the synthetic lengths vary."
        ),
    ] = 0.0,
    output_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_PROMPTS,
            help="Exact number of tokens of all answers: implies --ignore-eos.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_PROMPTS,
            help="Most tokens of an answer to a prompt without a limit of its own. Default: 128.",
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", rich_help_panel=_PROMPTS, help="Continue all answers to their limit."),
    ] = False,
    temperature: Annotated[
        float,
        typer.Option(
            min=0, max=10, rich_help_panel=_PROMPTS, help="Temperature of the sampling; 0 is greedy."
        ),
    ] = 0.0,
    concurrency: Annotated[
        str,
        typer.Option(
            metavar="N[,N...]",
            rich_help_panel=_LOAD,
            help="Requests in flight at a time; several numbers are measured one after another. Default: 8.",
        ),
    ] = "",
    rate: Annotated[
        str,
        typer.Option(
            metavar="R[,R...]",
            rich_help_panel=_LOAD,
            help="Instead, requests per second that are sent whether or not there are answers. Latencies "
            "count from the planned time.",
        ),
    ] = "",
    burstiness: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            rich_help_panel=_LOAD,
            help="Of the arrivals: 1 is a Poisson process (the default), less is burstier, more is steadier.",
        ),
    ] = None,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_LOAD,
            help="Most requests in flight with --rate; others wait for their turn.",
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_LOAD,
            help="Number of requests. Default without --seconds: 100, and 4 for each concurrent one.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1, rich_help_panel=_LOAD, help="Start no request later; those in flight are completed."
        ),
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, rich_help_panel=_LOAD, help="Requests before that are not measured.")
    ] = 4,
    seed: Annotated[
        int, typer.Option(min=0, rich_help_panel=_LOAD, help="Of the arrivals, and of the order of prompts.")
    ] = 0,
    timeout: Annotated[
        float, typer.Option(min=0.1, rich_help_panel=_LOAD, help="Seconds for an answer.")
    ] = 300.0,
    percentiles: Annotated[
        str, typer.Option(metavar="P,P", rich_help_panel=_RESULT, help="Percentiles of latencies to report.")
    ] = "50,90,95,99",
    goodput: Annotated[
        str,
        typer.Option(
            metavar="LIMITS",
            rich_help_panel=_RESULT,
            help="Count the requests within these milliseconds: ttft:500,tpot:50,e2el:3000.",
        ),
    ] = "",
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            rich_help_panel=_RESULT,
            help="Exit with status 1 unless this holds; repeat it for more. Names are those of --json: "
            "'p99_ttft_ms<=500', 'goodput_share>=0.95'.",
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_RESULT, help="Write the result with the keys of vLLM's."
        ),
    ] = None,
    save_detailed: Annotated[
        bool,
        typer.Option(
            "--save-detailed", rich_help_panel=_RESULT, help="Write all requests as well, with texts."
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_RESULT, help="Draw latencies and throughput as .png or .svg."
        ),
    ] = None,
    label: Annotated[str, typer.Option(rich_help_panel=_RESULT, help="Name of the result in --json.")] = "",
) -> None:
    """Send load and measure latencies and throughput, in the words of `vllm bench serve`.

    The target is a mesh, or with --url any server that streams OpenAI's API. A test request comes first.
    Ctrl-C prints the result so far.

    Exit status: 0; 1 if an --slo is not met; 2 if an option cannot be used; 3 if the target does not answer.

    Example:  headrace bench --concurrency 16 --requests 200

    Example:  headrace bench --rate 5 --seconds 60 --goodput ttft:500,tpot:50 --slo "goodput_share>=0.95"

    Example:  headrace bench --url http://127.0.0.1:8080/v1 --input-len 512 --output-len 128 --json out.json

    Example:  headrace bench --concurrency 1,4,16,64 --plot sweep.svg
    """
    from headrace.cli.bench import options
    from headrace.cli.bench.backends.openai import OpenAiOptions
    from headrace.cli.bench.bench import FAILED, USAGE, BenchOptions, TargetFailed
    from headrace.cli.bench.bench import bench as run
    from headrace.cli.bench.figures import NAMED
    from headrace.cli.bench.objectives import parse_goodput, parse_objective, parse_percentiles
    from headrace.cli.bench.prompts import ListedPrompts, built_in, read_prompts
    from headrace.cli.bench.synthetic import SyntheticPrompts

    with complaining(connection.target):
        try:
            if url and connection.target != DEFAULT_TARGET:
                raise options.BadOption("give either --url or --target")
            if url and tier:
                raise options.BadOption("--tier is for a mesh; with --url, use --model or --header")
            if not url and (header or extra_body):
                raise options.BadOption("--header and --extra-body need --url")
            if save_detailed and json is None:
                raise options.BadOption("--save-detailed needs --json")
            options.check_prompts(
                path=prompts,
                input_len=input_len,
                output_len=output_len,
                prefix_len=prefix_len,
                range_ratio=range_ratio,
                max_tokens=max_tokens,
            )
            objectives = [parse_objective(text, NAMED) for text in slo or ()]
            limits = parse_goodput(goodput)
            if not limits and any("good" in one.name for one in objectives):
                raise options.BadOption("an --slo on goodput needs the limits of --goodput")
            sent: ListedPrompts | SyntheticPrompts
            if input_len is not None:
                sent = SyntheticPrompts(
                    input_len=input_len,
                    max_tokens=max_tokens or 128,
                    output_len=output_len,
                    ignore_eos=ignore_eos,
                    prefix_len=prefix_len,
                    range_ratio=range_ratio,
                    seed=seed,
                )
            else:
                listed = read_prompts(prompts) if prompts else built_in(seed)
                sent = ListedPrompts(listed, max_tokens or 128, output_len, ignore_eos)
            status = run(
                BenchOptions(
                    connection=connection,
                    openai=OpenAiOptions(
                        url=url,
                        model=model,
                        temperature=temperature,
                        chat_api=endpoint == "chat",
                        api_key=api_key,
                        headers=options.parse_headers(header or ()),
                        extra_body=options.parse_body(extra_body),
                    )
                    if url
                    else None,
                    tier=tier,
                    model=model,
                    temperature=temperature,
                    chat_api=endpoint == "chat",
                    prompts=sent,
                    loads=options.loads(
                        concurrency=concurrency,
                        rate=rate,
                        burstiness=burstiness,
                        max_concurrency=max_concurrency,
                        requests=requests,
                        seconds=seconds,
                        seed=seed,
                        timeout=timeout,
                    ),
                    warmup=warmup,
                    percents=parse_percentiles(percentiles, objectives),
                    goodput=limits,
                    objectives=objectives,
                    json=json,
                    plot=plot,
                    detailed=save_detailed,
                    label=label,
                ),
                Console(),
                Console(stderr=True),
            )
        except options.BadOption as error:
            complain(str(error))
            raise typer.Exit(USAGE) from None
        except TargetFailed as error:
            complain(str(error))
            raise typer.Exit(error.status) from None
        except OSError as error:
            complain(str(error))
            raise typer.Exit(FAILED) from None
    raise typer.Exit(status)
