"""Decisions of `headrace up` before it starts a process."""

from __future__ import annotations

import dataclasses
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest

from headrace.cli.launch import mesh
from headrace.cli.launch.mesh import MeshSpec, plan_processes
from headrace.cli.launch.tiers import BadSpec, TierSpec, parse_tiers

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def spec(tmp_path: Path) -> MeshSpec:
    return MeshSpec(cache=tmp_path / "cache", log_dir=tmp_path / "logs", port=50051)


def flag(command: object, name: str) -> str:
    """Return the value of the flag *name*."""
    assert isinstance(command, list)
    return str(command[command.index(name) + 1])


def test_workers_start_first_and_each_stage_gets_the_ports_of_the_one_below(spec: MeshSpec) -> None:
    workers, batchers, (router,) = plan_processes(spec, [1, 2, 3, 4, 5], cores=8)

    assert [w.name for w in workers] == ["worker-small", "worker-large"]
    assert [w.port for w in workers] == [1, 2]
    assert [flag(b.command, "--workers") for b in batchers] == ["127.0.0.1:1", "127.0.0.1:2"]
    assert [flag(b.command, "--tier") for b in batchers] == ["small", "large"]
    assert flag(router.command, "--tiers") == "small=127.0.0.1:3,large=127.0.0.1:4"
    assert router.port == 50051
    assert flag(workers[0].command, "--model") == flag(batchers[0].command, "--model")


@pytest.mark.parametrize(("cores", "asked", "given"), [(8, 0, "4"), (2, 0, "1"), (1, 0, "1"), (2, 6, "6")])
def test_workers_share_the_cores(tmp_path: Path, cores: int, asked: int, given: str) -> None:
    spec = MeshSpec(cache=tmp_path, log_dir=tmp_path, threads=asked)

    workers, _, _ = plan_processes(spec, [1, 2, 3, 4, 5], cores=cores)

    assert [flag(worker.command, "--threads") for worker in workers] == [given, given]


@pytest.mark.skipif(sys.platform != "linux", reason="processes share a port on Linux only")
def test_a_mesh_without_models_on_its_cores_uses_them_for_several_routers_and_batchers(
    tmp_path: Path,
) -> None:
    spec = MeshSpec(cache=tmp_path, log_dir=tmp_path, fake=True)
    ports = list(range(1, mesh.ports_needed(spec, 16) + 1))

    workers, batchers, (router,) = plan_processes(spec, ports, cores=16)

    assert [worker.port for worker in workers] == [1, 2]
    assert [batcher.port for batcher in batchers] == list(range(3, 11))
    assert [batcher.name for batcher in batchers[:5]] == [
        *("batcher-small", "batcher2-small", "batcher3-small", "batcher4-small"),
        "batcher-large",
    ]
    assert [flag(batcher.command, "--workers") for batcher in batchers] == ["127.0.0.1:1"] * 4 + [
        "127.0.0.1:2"
    ] * 4
    assert flag(router.command, "--processes") == "4"
    assert flag(router.command, "--tiers") == (
        "small=127.0.0.1:3+127.0.0.1:4+127.0.0.1:5+127.0.0.1:6,"
        "large=127.0.0.1:7+127.0.0.1:8+127.0.0.1:9+127.0.0.1:10"
    )
    assert router.port == 11


@pytest.mark.parametrize(
    ("cores", "settings", "processes"),
    [
        pytest.param(2, {"fake": True}, 1, id="a small machine has one of each"),
        pytest.param(4, {"fake": True}, 1, id="so has one with a core each"),
        pytest.param(8, {"fake": True}, 2, id="8 cores"),
        pytest.param(16, {"device": "cuda"}, 4, id="16 cores beside a GPU"),
        pytest.param(64, {"device": "cuda"}, 4, id="a worker does not keep up with more"),
        pytest.param(16, {}, 1, id="models use all cores"),
        pytest.param(64, {"device": "cpu"}, 1, id="models use all cores of a large machine"),
        pytest.param(16, {"threads": 4}, 2, id="models leave half of the cores"),
        pytest.param(2, {"processes": 3}, 3, id="the flag decides"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="processes share a port on Linux only")
def test_routers_and_batchers_get_the_cores_that_the_workers_leave(
    tmp_path: Path, cores: int, settings: dict[str, Any], processes: int
) -> None:
    spec = MeshSpec(cache=tmp_path, log_dir=tmp_path, **settings)
    ports = list(range(1, mesh.ports_needed(spec, cores) + 1))

    workers, batchers, (router,) = plan_processes(spec, ports, cores=cores)

    assert (len(workers), len(batchers)) == (2, 2 * processes)
    assert ("--processes" in router.command) == (processes > 1)
    assert len({*ports}) == len(workers) + len(batchers) + 1


def test_a_fake_mesh_has_no_models(tmp_path: Path) -> None:
    spec = MeshSpec(cache=tmp_path, log_dir=tmp_path, fake=True, flags={"worker": ["--max-running", "2"]})

    workers, batchers, (router,) = plan_processes(spec, [1, 2, 3, 4, 5], cores=2)

    assert all("--fake" in batcher.command for batcher in batchers)
    assert all(flag(worker.command, "--engine") == "echo" for worker in workers)
    assert all("--model" not in process.command for process in (*workers, *batchers))
    assert flag(workers[0].command, "--max-running") == "2"
    assert router.port == 5


def test_every_process_gets_an_endpoint_of_its_own_and_the_routers_are_first(tmp_path: Path) -> None:
    spec = MeshSpec(cache=tmp_path, log_dir=tmp_path, fake=True, processes=3, metrics_port=9464)
    ports = list(range(1, mesh.ports_needed(spec, 2) + 1))

    workers, batchers, (router,) = plan_processes(spec, ports, cores=2)

    assert router.environment["HEADRACE_METRICS_PORT"] == "9464", "and the next two, of its other processes"
    others = [process.environment["HEADRACE_METRICS_PORT"] for process in (*workers, *batchers)]
    assert others == [str(port) for port in range(9467, 9467 + 8)]
    assert [process.environment["HEADRACE_TIER"] for process in workers] == ["small", "large"]


def test_a_gateway_starts_last_and_calls_the_router(tmp_path: Path) -> None:
    spec = MeshSpec(cache=tmp_path, log_dir=tmp_path, fake=True, gateway_port=0)
    ports = list(range(1, mesh.ports_needed(spec, 2) + 1))

    *_, (router,), (gateway,) = plan_processes(spec, ports, cores=2)

    assert (router.port, gateway.port) == (5, 6)
    assert flag(gateway.command, "--router") == "127.0.0.1:5"
    assert (router.protocol, gateway.protocol) == ("grpc", "http"), "how they are asked for their health"
    assert "--processes" not in gateway.command

    fixed = dataclasses.replace(spec, port=50051, gateway_port=8080)
    *_, (gateway,) = plan_processes(fixed, ports, cores=2)
    assert (gateway.port, flag(gateway.command, "--router")) == (8080, "127.0.0.1:50051")


def test_a_mesh_has_a_gateway_only_if_one_is_wanted(spec: MeshSpec) -> None:
    stages = plan_processes(spec, [1, 2, 3, 4, 5], cores=2)

    assert not [process for stage in stages for process in stage if process.name == "gateway"]


@pytest.mark.skipif(sys.platform != "linux", reason="processes share a port on Linux only")
def test_a_gateway_shares_the_cores_that_the_workers_leave(tmp_path: Path) -> None:
    spec = MeshSpec(cache=tmp_path, log_dir=tmp_path, fake=True, gateway_port=0, metrics_port=9464)
    ports = list(range(1, mesh.ports_needed(spec, 14) + 1))

    workers, batchers, (router,), (gateway,) = plan_processes(spec, ports, cores=14)

    assert len(batchers) == 2 * 3
    assert flag(router.command, "--processes") == flag(gateway.command, "--processes") == "3"
    assert (router.port, gateway.port) == (9, 10)
    # After the router's three and one for each worker and batcher; its other processes have the next ports.
    assert gateway.environment["HEADRACE_METRICS_PORT"] == str(9464 + 3 + len(workers) + len(batchers))


def test_a_gateway_has_a_certificate_of_its_own_and_serves_http(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is polled over HTTP, and its listener is on loopback."""
    monkeypatch.setenv("HEADRACE_HTTPS_CERT", "/mine.pem")
    spec = MeshSpec(cache=tmp_path, log_dir=tmp_path, fake=True, gateway_port=0, tls=True)

    *_, (gateway,) = plan_processes(spec, [1, 2, 3, 4, 5, 6], cores=2)

    assert flag(gateway.command, "--tls-cert") == str(tmp_path / "tls" / "gateway.pem")
    assert flag(gateway.command, "--host") == "127.0.0.1"
    assert "HEADRACE_HTTPS_CERT" not in gateway.environment


def test_only_router_and_gateway_of_a_mesh_have_untrusted_callers(spec: MeshSpec) -> None:
    """If all processes inherited HEADRACE_TRACE_CONTEXT, it would break a trace at each hop."""
    with_gateway = dataclasses.replace(spec, gateway_port=0)
    workers, batchers, (router,), (gateway,) = plan_processes(with_gateway, [1, 2, 3, 4, 5, 6], cores=2)

    inner = [process.environment["HEADRACE_TRACE_CONTEXT"] for process in (*workers, *batchers)]
    assert set(inner) == {"trust"}
    for edge in (router, gateway):
        assert edge.environment.get("HEADRACE_TRACE_CONTEXT") != "trust"


def test_only_router_and_gateway_ask_callers_for_credentials(
    spec: MeshSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The services behind them have no tokens to call each other with."""
    monkeypatch.setenv("HEADRACE_AUTH_TOKENS", "callers.toml")
    with_gateway = dataclasses.replace(spec, gateway_port=0)
    workers, batchers, (router,), (gateway,) = plan_processes(with_gateway, [1, 2, 3, 4, 5, 6], cores=2)

    for edge in (router, gateway):
        assert edge.environment["HEADRACE_AUTH_TOKENS"] == "callers.toml"
    assert not any("HEADRACE_AUTH_TOKENS" in process.environment for process in (*workers, *batchers))


def test_children_inherit_the_environment_less_what_the_flags_say(spec: MeshSpec) -> None:
    inherited = {"PATH": "/bin", "HEADRACE_PORT": "1", "HEADRACE_MODEL": "x", "HEADRACE_LINGER": "0.1"}

    environment = mesh.environment(spec, inherited)

    assert environment == {"PATH": "/bin", "HEADRACE_LINGER": "0.1", "GOMP_SPINCOUNT": "10000"}
    assert mesh.environment(spec, {"GOMP_SPINCOUNT": "5"})["GOMP_SPINCOUNT"] == "5"


async def test_a_port_in_use_is_detected_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        spec = MeshSpec(cache=tmp_path, log_dir=tmp_path / "logs", port=server.getsockname()[1], fake=True)

        with pytest.raises(BadSpec, match="--port"):
            async with mesh.mesh(spec):
                pass

    assert not spec.log_dir.exists()


@pytest.mark.parametrize(
    ("free", "said"),
    [
        pytest.param(False, "--gateway-port; --no-gateway starts no gateway", id="in use"),
        pytest.param(True, "--port and --gateway-port are both", id="the router's as well"),
    ],
)
def test_an_impossible_port_of_the_gateway_is_an_error_that_names_its_flags(
    tmp_path: Path, free: bool, said: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = mesh.free_ports(1)[0] if free else server.getsockname()[1]
        spec = MeshSpec(cache=tmp_path, log_dir=tmp_path, port=port if free else 0, gateway_port=port)

        with pytest.raises(BadSpec, match=said):
            mesh.require_free_ports(spec)


def test_free_ports_are_different_and_free() -> None:
    ports = mesh.free_ports(20)

    assert len(set(ports)) == 20
    for port in ports:
        mesh.require_free(port)


def test_a_reserved_port_is_given_to_no_other_and_can_be_listened_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with mesh.reserved_ports(3) as mine:
        more = mesh.free_ports(2)
        monkeypatch.setattr("headrace.cli.launch.mesh.random.sample", lambda range, k: [*mine, *more])

        assert mesh.free_ports(2) == more
        for port in mine:
            socket.create_server((mesh.HOST, port)).close()
    assert mesh.free_ports(3) == mine


MIXED = ("small=org/small", "medium=vllm:org/medium", "large=gpt@http://a/v1,http://b/v1")


def mixed(tmp_path: Path, **settings: Any) -> MeshSpec:
    """Return a mesh with a tier of each kind."""
    return MeshSpec(cache=tmp_path, log_dir=tmp_path / "logs", tiers=parse_tiers(MIXED), **settings)


def test_an_upstream_is_one_process_in_place_of_batchers_and_worker(tmp_path: Path) -> None:
    spec = mixed(tmp_path)
    ports = list(range(1, mesh.ports_needed(spec, 2) + 1))

    workers, fronts, (router,) = plan_processes(spec, ports, cores=2)

    assert [process.name for process in workers] == ["worker-small", "worker-medium"]
    assert [process.name for process in fronts] == ["batcher-small", "batcher-medium", "upstream-large"]
    upstream = fronts[-1].command
    assert "headrace.upstream" in upstream
    assert flag(upstream, "--url") == "http://a/v1,http://b/v1"
    assert (flag(upstream, "--model"), flag(upstream, "--tier")) == ("gpt", "large")
    assert flag(router.command, "--tiers") == "small=127.0.0.1:3,medium=127.0.0.1:4,large=127.0.0.1:5"
    assert [process.port for process in (*workers, *fronts, router)] == ports
    assert fronts[-1].about == "gpt at http://a/v1,http://b/v1"


def test_a_worker_on_vllm_runs_in_its_environment_with_its_arguments(tmp_path: Path) -> None:
    spec = mixed(
        tmp_path, vllm_python="/opt/vllm/bin/python", vllm_args="--max-model-len 4096", device="cuda"
    )

    (ours, vllm), (batcher, batcher_on_vllm, _), _ = plan_processes(spec, list(range(1, 10)), cores=2)

    assert [process.command[0] for process in (ours, batcher, batcher_on_vllm)] == [sys.executable] * 3
    assert vllm.command[0] == "/opt/vllm/bin/python"
    assert flag(vllm.command, "--engine") == "vllm"
    assert "--engine-args=--max-model-len 4096" in vllm.command
    assert "--engine" not in ours.command
    assert not [word for word in vllm.command if word.startswith(("--device", "--dtype", "--threads"))]
    assert flag(vllm.command, "--model") == flag(batcher_on_vllm.command, "--model") == "org/medium"
    assert vllm.environment["PYTHONPATH"] == str(mesh.packages_of(spec))
    assert "VLLM_CPU_OMP_THREADS_BIND" not in ours.environment
    assert vllm.about == "org/medium on vLLM"


def test_worker_and_batcher_of_a_tier_on_vllm_use_the_unpacked_folder(tmp_path: Path) -> None:
    tier = TierSpec("m", "smollm2-135m-instruct", "vllm", files="/cache/unpacked/smollm2")
    spec = MeshSpec(cache=tmp_path, log_dir=tmp_path, tiers=[tier])

    (worker,), (batcher,), _ = plan_processes(spec, [1, 2, 3], cores=2)

    assert flag(worker.command, "--model") == flag(batcher.command, "--model") == "/cache/unpacked/smollm2"
    assert "--model-name=smollm2-135m-instruct" in worker.command
    assert worker.about == "smollm2-135m-instruct on vLLM"


def test_workers_of_both_engines_share_the_cores_and_an_upstream_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (ours, vllm), _, _ = plan_processes(mixed(tmp_path), list(range(1, 10)), cores=8)

    assert flag(ours.command, "--threads") == vllm.environment["OMP_NUM_THREADS"] == "4"


def test_a_mesh_of_upstreams_alone_has_no_workers(tmp_path: Path) -> None:
    spec = MeshSpec(cache=tmp_path, log_dir=tmp_path, tiers=parse_tiers(["a=m@http://a/v1"]))

    workers, (upstream,), (router,) = plan_processes(spec, [1, 2], cores=1)

    assert workers == []
    assert (upstream.port, router.port) == (1, 2)


def test_echo_engines_replace_models_and_leave_upstreams(tmp_path: Path) -> None:
    (ours, vllm), (*_, upstream), _ = plan_processes(mixed(tmp_path, fake=True), list(range(1, 10)), cores=2)

    assert vllm.command[0] == sys.executable
    for worker in (ours, vllm):
        assert flag(worker.command, "--engine") == "echo"
        assert worker.about == "echo"
    assert "--fake" not in upstream.command


def test_the_key_of_an_upstream_reaches_no_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_API_KEY_FILE", "/key")
    stages = plan_processes(mixed(tmp_path, gateway_port=0), list(range(1, 10)), cores=2)

    having = {each.name for stage in stages for each in stage if "HEADRACE_API_KEY_FILE" in each.environment}
    assert having == {"upstream-large"}


def test_an_upstream_shows_the_certificate_of_a_batcher(tmp_path: Path) -> None:
    """The router calls both alike, so they have the same role."""
    _, (*_, upstream), _ = plan_processes(mixed(tmp_path, tls=True), list(range(1, 10)), cores=2)

    assert flag(upstream.command, "--tls-cert").endswith("/tls/batcher.pem")
