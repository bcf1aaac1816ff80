"""What README and docs/ tell people to type works, and the names in them exist."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from collections.abc import AsyncGenerator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from typer.main import get_command
from typer.testing import CliRunner

from headrace import attributes, errors
from headrace.batcher.settings import Settings as BatcherSettings
from headrace.cli.__main__ import app
from headrace.cli.launch.mesh import MeshSpec, Running, mesh
from headrace.gateway.settings import Settings as GatewaySettings
from headrace.metrics.catalogue import METRICS
from headrace.multiplex import limits
from headrace.router.quotas.limits import Rules
from headrace.router.settings import Settings as RouterSettings
from headrace.runtime.security import callers_file
from headrace.runtime.settings import PREFIX, ProcessSettings, ServiceSettings
from headrace.upstream.settings import Settings as UpstreamSettings
from headrace.v1 import generation_pb2 as pb
from headrace.worker.settings import Settings as WorkerSettings
from tests.harness import PATIENCE

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "services" / "headrace"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
EVERYTHING = "\n".join(PAGES.values())
README, CONTRACT, OPERATING = (PAGES[name] for name in ("README.md", "docs/contract.md", "docs/operating.md"))
METRICS_PAGE, TELEMETRY = PAGES["docs/metrics.md"], PAGES["docs/telemetry.md"]
SETTINGS: dict[str, type[ProcessSettings]] = {
    "router": RouterSettings,
    "batcher": BatcherSettings,
    "worker": WorkerSettings,
    "upstream": UpstreamSettings,
    "gateway": GatewaySettings,
}
ADDRESS = "127.0.0.1:50051"
GATEWAY = "http://127.0.0.1:8080"
BATCHER = "127.0.0.1:50052"
# Of other tools: docker, buildah, kubectl, pip, apt-get, llama.cpp.
OTHER_FLAGS = {
    "--enable-auto-tool-choice",
    "--distributed-executor-backend",
    "--tool-call-parser",
    "--build-arg",
    "--from-file",
    "--replicas",
    "--watch",
    "--extra-index-url",
    "--merge",
    "--timestamp",
    "--no-install-recommends",
    "--image",
    "--previous",
    # of lm-evaluation-harness, guidellm and vLLM's benchmark
    "--apply",
    "--base-url",
    "--backend",
    "--constraint",
    "--data",
    "--dataset-name",
    "--endpoint",
    "--ignore-eos",
    "--max-concurrency",
    "--model",
    "--num-prompts",
    "--profile",
    "--random-input-len",
    "--random-output-len",
    "--tasks",
    "--tokenizer",
    # of vLLM
    "--config",
    "--data-parallel-size",
    "--device-ids",
    "--enable-prefix-caching",
    "--enforce-eager",
    "--gpu-memory-utilization",
    "--kv-cache-memory-bytes",
    "--load-format",
    "--max-model-len",
    "--max-num-batched-tokens",
    "--master-addr",
    "--max-num-seqs",
    "--nnodes",
    "--node-rank",
    "--pipeline-parallel-size",
    "--quantization",
    "--tensor-parallel-size",
    "--trust-remote-code",
}
# In capitals, besides reasons, statuses and variables.
OTHER_NAMES = {
    "STOP_SEQUENCE",
    "BEST_EFFORT",
    "CACHED_PROMPT",
    "IPC_LOCK",
    "NCCL_DEBUG",
    "OMP_NUM_THREADS",
    "OPENAI_API_KEY",
    "PIP_ARGS",
    "PYTHON_IMAGE",
    "SOURCE_DATE_EPOCH",
    "SSL_CERT_FILE",
    "TOOL_MODE_REQUIRED",
    "TOOLS_FOLDER",
    "TOOL_CALLS",  # a marker in templates of Mistral
}
MESSAGES: dict[str, Descriptor] = {
    "chat": pb.Chat.DESCRIPTOR,
    "sampling": pb.Sampling.DESCRIPTOR,
    "routing": pb.Routing.DESCRIPTOR,
    "stream": pb.StreamOptions.DESCRIPTOR,
    "resume": pb.Resume.DESCRIPTOR,
    "finish": pb.Finish.DESCRIPTOR,
    "usage": pb.Usage.DESCRIPTOR,
}


def blocks(language: str, text: str) -> list[str]:
    """The fenced blocks of a language; "" for those without one."""
    every = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in every if name == language]


def commands(text: str) -> list[str]:
    """The lines of the blocks without a language, those that are continued as one."""
    return [line for block in blocks("", text) for line in block.replace("\\\n", " ").splitlines() if line]


def grpcurl_commands(text: str) -> list[str]:
    """Every grpcurl command, with the lines that belong to it."""
    lines = "".join(block for block in blocks("", text) if "grpcurl -plaintext" in block)
    return re.findall(r"^grpcurl .*?(?=^grpcurl |\Z)", lines, re.MULTILINE | re.DOTALL)


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@cache
def cli_help(command: str) -> str:
    """The help of a command, with that of its sub-commands."""
    found: Any = get_command(app)
    names = list(getattr(found.commands.get(command), "commands", ()))
    return "".join(
        CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"}).output
        for words in ([command], *([command, name] for name in names))
    )


@cache
def sources() -> str:
    """All of our own source."""
    folders = (PACKAGE, ROOT / "benchmarks", ROOT / "tests")
    return "\n".join(
        path.read_text()
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        if path != Path(__file__)
    )


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Running, None]:
    """`headrace up --fake`, on a free port."""
    folder = tmp_path_factory.mktemp("docs")
    spec = MeshSpec(cache=folder, log_dir=folder / "logs", fake=True, fake_step_seconds=0, gateway_port=0)
    async with mesh(spec) as up:
        yield up


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    printed, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 0, printed.decode()
    return printed.decode()


def deltas_in(printed: str) -> list[dict[str, Any]]:
    """The deltas of a stream of answers that grpcurl printed."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(printed):
        message, at = decoder.raw_decode(printed, at)
        found.append(message.get("delta", {}))
        at += len(printed[at:]) - len(printed[at:].lstrip())
    return found


def text_in(printed: str) -> str:
    return "".join(delta.get("text", "") for delta in deltas_in(printed))


def calls_in(printed: str) -> list[tuple[str, str]]:
    """The names and arguments of calls, all parts joined."""
    calls: list[list[str]] = []
    for delta in deltas_in(printed):
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append([part["name"], ""])
            calls[-1][1] += part.get("arguments", "")
    return [(name, arguments) for name, arguments in calls]


async def test_every_grpcurl_command_works_as_printed(running: Running) -> None:
    batcher = next(process for process in running.processes if process.name == "batcher-small")

    def here(command: str) -> str:
        return command.replace(ADDRESS, running.address).replace(BATCHER, f"127.0.0.1:{batcher.port}")

    async def printed(text: str) -> list[str]:
        return [await run("bash", "-c", here(command)) for command in grpcurl_commands(text)]

    listed, described, generated, explained, tiers, rated, health = await printed(README)
    *forms, required, named, told, resumed, counted, multiplexed = await printed(CONTRACT)
    (inside,) = await printed(OPERATING)
    assert len(grpcurl_commands(EVERYTHING)) == 19, "one is on a page that is not tried here"
    assert "headrace.v1.GenerationService" in listed
    assert "rpc Generate" in described
    answer = "".join(re.findall(r'"text": "(.*)"', generated))  # in one part or several
    assert "What is the capital of France?" in answer, "the echo engine repeats it"
    assert '"tier": "large"' in explained
    assert '"name": "small"' in tiers
    assert '"tier": "small"' in rated
    assert "SERVING" in health
    schema, anything, date, choice, total = map(text_in, forms)
    assert "city" in json.loads(schema)
    assert isinstance(json.loads(anything), dict)
    assert (date, choice, total) == ("2026-11-29", "no", "1+20")
    ((called, arguments),) = calls_in(required)
    assert called == "weather"
    assert "city" in json.loads(arguments)
    assert calls_in(named) == [("clock", "{}")]
    assert text_in(told) == "It is noon.", "the echo engine repeats the result"
    assert "".join(re.findall(r'"text": "(.*)"', resumed)) == "llo"
    assert '"tokens": 5' in counted
    assert "".join(re.findall(r'"text": "(.*)"', multiplexed)) == "Hello"
    assert '"reason":"INVALID_SAMPLING"' in multiplexed
    assert '"state": "ready"' in inside


async def test_every_python_example_works_as_printed(running: Running, tmp_path: Path) -> None:
    examples = blocks("python", EVERYTHING)
    assert examples
    for example in examples:
        script = tmp_path / "example.py"
        script.write_text(example.replace(ADDRESS, running.address).replace(GATEWAY, running.gateway))

        assert "Why is the sky blue?" in await run(sys.executable, str(script))


def test_every_command_of_ours_parses() -> None:
    """Up to its `--help`: commands and flags exist, whatever they would do."""
    shown = [
        shlex.split(line, comments=True)
        for line in commands(EVERYTHING)
        if re.match(r"(\w+=\S+ )*headrace ", line)
    ]
    assert len(shown) > 15
    for words in shown:
        command, *arguments = words[words.index("headrace") + 1 :]
        known = flags_in(cli_help(command))
        assert known, command
        assert flags_in(" ".join(word for word in arguments if word.startswith("--"))) <= known, words


def test_every_service_that_is_started_takes_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [line for line in commands(EVERYTHING) if "python -m headrace." in line]
    assert len(shown) >= 20
    for line in shown:
        with monkeypatch.context() as environment:
            words = shlex.split(line)
            module = words[words.index("-m") + 1]
            for setting in words[: words.index("python")]:
                environment.setenv(*setting.split("=", 1))
            SETTINGS[module.split(".")[1]].load(words[words.index(module) + 1 :])


def test_the_file_of_callers_is_accepted() -> None:
    (shown,) = blocks("toml", PAGES["docs/security.md"])

    found = callers_file.parse(shown.encode())

    assert {grant.identity.tenant for grant in found.tokens.values()} == {"search"}
    assert set(found.certificates) == {"spiffe://example.org/search"}


def test_the_file_of_quotas_is_accepted(tmp_path: Path) -> None:
    (shown,) = blocks("toml", PAGES["docs/quotas.md"])
    path = tmp_path / "quotas.toml"
    path.write_text(shown)

    rules = Rules(path)

    assert rules.limits("acme", "").concurrent_streams == 128
    assert rules.limits("another", "gold").concurrent_streams == 64
    assert rules.limits("another", "").requests_per_minute == 600


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_of_make_benchmarks_and_tests_is_there(page: str) -> None:
    text = PAGES[page]
    targets = re.findall(r"(?:`|^)make ([a-z][a-z-]+)", text, re.MULTILINE)
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(targets) <= known
    for module in re.findall(r"python -m\s+(benchmarks[\w.]*)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    for place in re.findall(r"pytest (tests[\w/.]*)", text):
        assert (ROOT / place).exists(), place


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_is_one(page: str) -> None:
    services = {flag(name) for kind in SETTINGS.values() for name in kind.model_fields}
    cli = set().union(*(flags_in(cli_help(name)) for name in re.findall(r"headrace ([a-z]+)", EVERYTHING)))
    known = services | {f"--no-{name[2:]}" for name in services} | cli | OTHER_FLAGS

    unknown = flags_in(PAGES[page]) - known - {"--help"}
    assert {found for found in unknown if f'"{found}"' not in sources()} == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_name_in_capitals_is_a_reason_a_status_or_a_variable(page: str) -> None:
    known = {kind.reason for kind in all_errors()} | {status.name for status in grpc.StatusCode}
    fields = {PREFIX + name.upper() for kind in SETTINGS.values() for name in kind.model_fields}

    for name in set(re.findall(r"(?<![\w.])[A-Z]+(?:_[A-Z]+)+(?![\w(*])", PAGES[page])):
        if name.startswith(PREFIX):
            assert name in fields or re.search(rf"\b{name}\b", sources()), name
        elif not name.startswith(("OTEL_", "GRPC_", "HF_", "TRITON_", "VLLM_")):
            assert name in known | OTHER_NAMES, name


def rows(text: str, heading: str) -> Iterator[list[str]]:
    """The cells of the table below *heading*, without its first two lines."""
    section = text.partition(f"\n{heading}\n")[2]
    table = re.search(r"^(?:\|.*\n)+", section, re.MULTILINE)
    assert table is not None, heading
    for line in table[0].splitlines()[2:]:
        yield [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def shown_default(name: str, kind: type[ProcessSettings]) -> str:
    """The default of a setting, as the tables of settings write it."""
    info = kind.model_fields[name]
    if info.is_required():
        return "required"
    if isinstance(info.default, bool):
        return "on" if info.default else "off"
    if isinstance(info.default, float | int):
        return f"{info.default:g}" if info.default < 1e6 else str(info.default)
    return str(info.default or "none")


def test_the_settings_of_all_services_are_those_of_the_table() -> None:
    listed = {name.strip("`"): default for name, default, _ in rows(OPERATING, "### All services")}

    assert set(listed) == {flag(name) for name in ServiceSettings.model_fields}
    for name in ServiceSettings.model_fields:
        usual, _, others = listed[flag(name)].partition(" (")
        assert usual == shown_default(name, ServiceSettings), name
        own = dict(re.findall(r"(\w+) ([\w.]+)", others))
        for service, kind in SETTINGS.items():
            if name not in kind.model_fields:
                continue  # of gRPC servers, and not of the gateway
            assert own.get(service, usual) == shown_default(name, kind), (service, name)


@pytest.mark.parametrize("service", SETTINGS)
def test_the_settings_of_a_service_are_those_of_its_table(service: str) -> None:
    kind = SETTINGS[service]
    listed = {name.strip("`"): default for name, default, _ in rows(OPERATING, f"### {service.title()}")}

    own = [name for name in kind.model_fields if name not in ServiceSettings.model_fields]
    assert listed == {flag(name): shown_default(name, kind) for name in own}


def all_errors() -> list[type[errors.HeadraceError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.HeadraceError)
    ]


def test_the_table_of_errors_has_each_reason_with_its_status() -> None:
    listed = {}
    for _, status, reasons, *_ in rows(CONTRACT, "## Errors"):
        listed.update(dict.fromkeys(re.findall(r"[A-Z][A-Z0-9_]+", reasons), status))
    ours = [kind for kind in all_errors() if not issubclass(kind, errors.Foreign)]

    assert set(listed) == {kind.reason for kind in ours} | {errors.Foreign.reason}
    for kind in ours:
        assert kind.code.name in listed[kind.reason], kind


def test_the_limits_of_a_stream_are_those_of_the_table() -> None:
    shown = [value for _, value, _ in rows(CONTRACT, "### Limits of a stream")]

    assert shown[:2] == [str(limits.MAX_OPENS), str(limits.MAX_HANDLES)]


@pytest.mark.parametrize("page", PAGES)
def test_every_span_metric_and_module_is_one(page: str) -> None:
    known = {value for value in vars(attributes).values() if isinstance(value, str)}
    known |= {metric.name for metric in METRICS}
    for name in re.findall(r"`((?:headrace|gen_ai|rpc|router|batcher|worker)\.[a-z_.]+)`", PAGES[page]):
        module = PACKAGE.parent / name.replace(".", "/")
        assert name in known or module.with_suffix(".py").exists(), name


def test_every_metric_to_watch_is_one() -> None:
    table = TELEMETRY.partition("| to watch | metrics |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([a-z_.]+)`", table))

    assert len(named) > 15
    assert named <= {metric.name for metric in METRICS}


def test_the_table_of_metrics_is_the_catalogue() -> None:
    listed = list(rows(METRICS_PAGE, "## All metrics"))

    assert listed == [
        [
            f"`{metric.name}`",
            f"`{metric.prometheus_name}`",
            metric.kind,
            metric.unit,
            ", ".join(f"`{_label(name)}`" for name in metric.attribute_names) or "-",
            ", ".join(metric.services),
            metric.description,
        ]
        for metric in METRICS
    ]


def test_every_label_of_a_metric_is_explained() -> None:
    explained = {
        name for names, _ in rows(METRICS_PAGE, "## Labels") for name in re.findall(r"`([a-z_]+)`", names)
    }

    assert explained == {_label(name) for metric in METRICS for name in metric.attribute_names}


def test_every_query_is_of_metrics_that_exist() -> None:
    known = {metric.prometheus_name for metric in METRICS}
    labels = {_label(name) for metric in METRICS for name in metric.attribute_names}
    known |= {f"{metric.prometheus_name}_bucket" for metric in METRICS if metric.kind == "histogram"}
    queries = [query for _, query in rows(METRICS_PAGE, "## Queries")]

    assert len(queries) > 5
    for name in re.findall(r"\b(?:headrace|gen_ai|rpc|process)_\w+", " ".join(queries)):
        assert name in known | labels, name


def _label(name: str) -> str:
    return name.replace(".", "_")


def test_every_message_to_troubleshoot_is_one() -> None:
    services = "\n".join(path.read_text() for path in sorted(PACKAGE.rglob("*.py")))
    shown = [
        part.strip()
        for symptom, *_ in rows(OPERATING, "## Troubleshooting")
        for message in re.findall(r"`([^`]+)`", symptom)
        for part in re.split("HOST:PORT|VARIABLE|NAME", message)
    ]

    assert len(shown) > 8
    assert [part for part in shown if part not in services] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_field_of_a_message_is_one(page: str) -> None:
    for message, name in re.findall(rf"`({'|'.join(MESSAGES)})\.([a-z_]+)`", PAGES[page]):
        assert name in MESSAGES[message].fields_by_name, f"{message}.{name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_path_is_there(page: str) -> None:
    """Paths from the top of the repository, and from services/headrace, with or without .py."""
    tops = {path.name for path in (*ROOT.iterdir(), *PACKAGE.iterdir())} - {"build", ".venv"}
    for found in re.findall(r"`([\w.-]+/[\w./*-]*)`", PAGES[page]):
        if found.split("/")[0] not in tops:
            continue
        places = [base / found.rstrip("/") for base in (ROOT, PACKAGE)]
        there = [place for place in places if place.exists() or place.with_suffix(".py").exists()]
        assert there or ("*" in found and list(ROOT.glob(found))), found


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200
