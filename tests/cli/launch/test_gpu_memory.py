"""How tiers whose workers share a GPU divide its memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from headrace.cli.__main__ import app
from headrace.cli.launch import up
from headrace.cli.launch.gpu_memory import memory_shares, weight_bytes
from headrace.cli.launch.mesh import MeshSpec, plan_processes
from headrace.cli.launch.tiers import BadSpec, parse_tiers
from headrace.worker.settings import Settings

SHARE = "HEADRACE_GPU_MEMORY_SHARE"


@pytest.mark.parametrize("sizes", [[1, 1], [0, 0], [1, 500], [3, 30, 280], [7, 7, 7, 7, 7, 7, 7]])
def test_shares_fit_together_and_leave_space_beside_small_and_large_weights(sizes: list[int]) -> None:
    weights = {str(index): size for index, size in enumerate(sizes)}

    shares = {name: float(share) for name, share in memory_shares(weights).items()}

    assert 0.99 < sum(shares.values()) <= 1
    assert all(share > 0.2 / len(sizes) for share in shares.values())
    assert sorted(shares, key=shares.__getitem__) == sorted(weights, key=weights.__getitem__)


def test_the_weights_of_a_folder_and_of_a_file_are_counted(tmp_path: Path) -> None:
    for name, size in {"a.safetensors": 10, "b.safetensors": 20, "c.bin": 7, "model.gguf": 40}.items():
        (tmp_path / name).write_bytes(bytes(size))

    assert weight_bytes(tmp_path) == 30
    assert weight_bytes(tmp_path / "model.gguf") == 40


@pytest.mark.parametrize(
    ("device", "tiers", "shared"),
    [
        ("cuda", ["a", "b"], {"a": "0.312", "b": "0.687"}),
        ("cuda:1", ["a", "b"], {"a": "0.312", "b": "0.687"}),
        ("cuda", ["a"], {}),
        ("cpu", ["a", "b"], {}),
        ("", ["a", "b"], {}),
    ],
)
def test_up_divides_the_memory_between_the_workers_of_a_gpu(
    device: str, tiers: list[str], shared: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SHARE, raising=False)
    for name, size in (("a", 100), ("b", 300)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
    spec = MeshSpec(
        cache=tmp_path,
        log_dir=tmp_path,
        device=device,
        tiers=parse_tiers([*(f"{name}={tmp_path / name}" for name in tiers), "far=gpt@http://far/v1"]),
    )

    prepared = up.prepare(spec, Console(quiet=True))

    workers, others, *_ = plan_processes(prepared, list(range(1, 12)), cores=2)
    given = {each.environment["HEADRACE_TIER"]: each.environment.get(SHARE) for each in workers}
    assert given == {name: shared.get(name) for name in tiers}
    assert not [each for each in others if SHARE in each.environment]
    for worker in workers:
        monkeypatch.setenv(SHARE, worker.environment.get(SHARE, "1"))
        assert Settings.load(["--engine", "echo"]).gpu_memory_share <= 1


def test_the_variable_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARE, "0.2")
    spec = MeshSpec(
        cache=tmp_path,
        log_dir=tmp_path,
        device="cuda",
        gpu_memory_shares={"small": "0.3", "large": "0.7"},
    )

    workers, *_ = plan_processes(spec, list(range(1, 12)), cores=2)

    assert [worker.environment[SHARE] for worker in workers] == ["0.2", "0.2"]


@pytest.mark.parametrize("command", ["up", "demo"])
def test_the_device_may_be_a_variable(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers inherit it, so threads and memory must be planned for it."""
    found: list[MeshSpec] = []

    def prepare(spec: MeshSpec, _: Console) -> MeshSpec:
        found.append(spec)
        raise BadSpec("enough")

    monkeypatch.setattr(up, "prepare", prepare)

    result = CliRunner().invoke(app, [command, "--cache", str(tmp_path)], env={"HEADRACE_DEVICE": "cuda:1"})

    assert result.exit_code
    assert [spec.device for spec in found] == ["cuda:1"]
