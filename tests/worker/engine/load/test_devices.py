"""The device that a setting means, and the machines on which a worker for a GPU does not start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.worker.engine.gpu import probes
from headrace.worker.engine.load import free_memory
from headrace.worker.engine.load.assembly import as_unsupported
from headrace.worker.engine.load.devices import Target, choose_device, set_up
from headrace.worker.engine.load.refusals import LoadingError

CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make this machine look like one with two GPUs, with changes given by the names of probes."""

    def change(**probed: Any) -> None:
        for name, found in {
            "built_cuda": "13.0",
            "driver_cuda": "13.1",
            "start_error": "",
            "device_count": 2,
            "capability": (9, 0),
            "device_name": "NVIDIA H100 80GB HBM3",
            "triton_version": "3.6.0",
            "compiler": "/usr/bin/gcc",
            "has_python_headers": True,
            **probed,
        }.items():

            def probe(*_: object, found: Any = found) -> Any:
                if isinstance(found, Exception):
                    raise found
                return found

            monkeypatch.setattr(probes, name, probe)

    return change


def refusal(device: str) -> str:
    """Return the message for a device that cannot be used, which is one line."""
    with pytest.raises(LoadingError) as refused:
        choose_device(device)
    message = str(refused.value)
    assert "\n" not in message
    assert f"{device!r} was requested" in message
    return message


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_machine_with_gpus_computes_on_the_chosen_one(
    device: str, index: int, machine: Callable[..., None]
) -> None:
    machine()

    assert choose_device(device) == Target(torch.device("cuda", index), gpu=True)


def test_a_cpu_needs_nothing_of_a_gpu(machine: Callable[..., None]) -> None:
    machine(built_cuda="", driver_cuda="", triton_version=ImportError("none"), device_count=0)

    target = choose_device("cpu")

    assert target == Target(torch.device("cpu"), gpu=False)
    assert target.kernels.startswith("cpu")


@pytest.mark.parametrize(
    ("probed", "reason", "advice"),
    [
        ({"built_cuda": ""}, "is a build without CUDA", "install the CUDA build"),
        ({"driver_cuda": ""}, "there is no NVIDIA driver", "docker run --gpus all"),
        ({"driver_cuda": "12.8"}, "the NVIDIA driver supports CUDA 12.8", "update the driver"),
        ({"device_count": 0}, "finds no CUDA device: none is visible", "CUDA_VISIBLE_DEVICES"),
        ({"device_count": 0, "start_error": "CUDA error:\nbusy"}, "device: CUDA error: busy", "nvidia-smi"),
        ({"device_count": 1}, "finds only cuda:0", "choose another device"),
        ({"start_error": "unknown error"}, "CUDA does not start: unknown error", "nvidia-smi"),
        ({"capability": (7, 5), "device_name": "Tesla T4"}, "Tesla T4 has compute capability 7.5", "8.0"),
        (
            {"triton_version": ImportError("no module")},
            "Triton cannot be imported (no module)",
            "pip install",
        ),
        ({"triton_version": "3.5.1"}, "Triton 3.5.1 is older than 3.6", "pip install"),
        ({"compiler": ""}, "Triton needs a C compiler", "install gcc"),
        ({"has_python_headers": False}, "Python.h is missing", "python3-dev"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_machine_that_cannot_compute_is_rejected_with_the_reason_and_what_to_do(
    probed: dict[str, Any], reason: str, advice: str, machine: Callable[..., None]
) -> None:
    machine(**probed)

    message = refusal("cuda:1")

    assert reason in message
    assert advice in message


def test_an_older_driver_of_the_same_major_version_is_accepted(machine: Callable[..., None]) -> None:
    """CUDA's minor versions are compatible."""
    machine(built_cuda="12.8", driver_cuda="12.4", triton_version="3.10.0a1+git")

    assert choose_device("cuda").gpu


@pytest.mark.parametrize("device", ["tpu", "mps", "meta", "cuda:x"])
def test_other_devices_are_rejected(device: str) -> None:
    with pytest.raises(LoadingError, match="is not one of cpu, cuda, cuda:N"):
        choose_device(device)


def test_kernels_of_different_hardware_differ(machine: Callable[..., None]) -> None:
    """Else an answer that moves between them would be taken for continued bit-identically."""
    seen = {Target(torch.device("cpu"), gpu=False).kernels}
    for capability in ((8, 0), (9, 0)):
        machine(capability=capability)
        seen.add(Target(CUDA, gpu=True).kernels)
    machine(triton_version="3.7.1")
    seen.add(Target(CUDA, gpu=True).kernels)

    assert len(seen) == 4


@pytest.fixture
def triton_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "triton_start_error", lambda: "")


@pytest.mark.usefixtures("triton_starts")
@pytest.mark.parametrize("exact", [True, False])
def test_exact_results_need_settings_of_cublas_before_cuda_starts(
    exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(probes, "round_once", lambda: called.append("round_once"))
    environment = {"CUBLAS_WORKSPACE_CONFIG": "before", "TRITON_CACHE_DIR": "chosen"}
    monkeypatch.setattr("os.environ", environment)

    set_up(Target(CUDA, gpu=True), tmp_path, exact=exact)

    assert environment["TRITON_CACHE_DIR"] == "chosen"
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == (":16:8" if exact else "before")
    assert ("CUBLASLT_WORKSPACE_SIZE" in environment) is exact
    assert called == ["round_once"] * exact


@pytest.mark.usefixtures("triton_starts")
def test_compiled_kernels_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", environment := dict[str, str]())

    set_up(Target(CUDA, gpu=True), tmp_path, exact=False)

    assert environment == {"TRITON_CACHE_DIR": str(tmp_path / "triton")}


def test_a_machine_on_which_triton_launches_no_kernels_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would look like a problem of the model. Here, it is the missing GPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton can start")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/compiled")

    with pytest.raises(
        LoadingError, match=r"Triton cannot build .*active drivers.* write to, now /compiled$"
    ):
        set_up(Target(CUDA, gpu=True), tmp_path, exact=False)


@pytest.mark.parametrize("free", [0, 10_000])
def test_a_gpu_without_space_for_the_weights_is_rejected(
    free: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_memory, "free_bytes", lambda _: free)

    with (
        pytest.raises(
            LoadingError, match=r"cuda:0 has 0\.0 GiB of free memory, too little for .* a larger GPU"
        ),
        free_memory.enough_for_weights(folder, torch.float32, CUDA),
    ):
        pytest.fail("nothing should be read")


def test_weights_that_do_not_fit_although_memory_is_free_are_rejected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may be fragmented, or taken by another process meanwhile."""
    monkeypatch.setattr(free_memory, "free_bytes", lambda _: 1 << 40)

    with (
        pytest.raises(LoadingError, match=r"too little for .* GiB of weights; end other processes"),
        free_memory.enough_for_weights(folder, torch.float32, CUDA),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "a graph", "a kernel", "cuBLAS"],
)
def test_a_gpu_without_space_for_a_step_is_rejected(error: Exception) -> None:
    with (
        pytest.raises(
            LoadingError, match=r"cuda:0 has too little memory for steps of 2048 tokens and 256 seq"
        ),
        free_memory.enough_for_steps(CUDA, step_tokens=2048, max_running=256),
        as_unsupported(object(), gpu=True),
    ):
        raise error


@pytest.mark.usefixtures("triton_starts")
def test_a_worker_that_shares_a_gpu_is_limited_to_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first worker takes nine tenths, and the second does not start."""
    limits: list[float] = []
    monkeypatch.setattr("os.environ", dict[str, str]())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7 << 30, 8 << 30))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share)
    )

    set_up(Target(CUDA, gpu=True), tmp_path, exact=False)
    set_up(Target(CUDA, gpu=True), tmp_path, exact=False, memory_share=0.5)

    assert limits == [0.5 - 1 / 16]


@pytest.mark.parametrize(
    ("fraction", "reserved", "free"),
    [(1.0, 1, 7), (0.5, 1, 3), (0.5, 5, 0), (0.95, 0, 7)],
    ids=["whole", "the rest of its share", "beyond its share", "taken by others"],
)
def test_free_memory_ends_at_the_share_of_the_worker(
    fraction: float, reserved: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved << 30)

    assert free_memory.free_bytes(CUDA) == free << 30
