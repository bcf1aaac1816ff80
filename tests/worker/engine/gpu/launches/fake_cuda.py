"""A CUDA device that computes nothing: engines are built, captured and launched on tensors without memory.

torch's FakeTensorMode computes devices, shapes and dtypes of tensors, and raises where devices are mixed.
Instead of launching kernels, their launches are recorded, so that they can be checked and compiled.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from triton.runtime.jit import KernelInterface

from headrace.worker.engine.gpu import cuda, likelihoods, sampler, slots
from headrace.worker.engine.gpu.kernels.report import MODULES, variants

# A build of torch without CUDA has no such tensors, not even fake ones. Then the other device without memory
# stands for it: it is not the host's either.
CUDA = torch.device("cuda", 0) if torch.version.cuda else torch.device("meta")

_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip
_HALF = {"*bf16", "*fp16"}
_MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)  # per dimension of a grid

# Arguments that the docstrings of their launchers allow to have gaps.
_STRIDED = {
    "attend_tile": ("query", "out", "partials"),  # out stands for partials that are not used
    "merge_segments": ("out",),
    "_store": ("keys", "values"),
    "_multiply": ("x", "bias"),  # x stands for a bias that is not used
    "_merge": ("bias",),
}


@dataclass(frozen=True, slots=True)
class Launch:
    """What decides how Triton compiles a launch.

    module, kernel   where the kernel is, and its name
    signature        type of each run-time argument
    constants        the others, with integers that are 1, which Triton makes constants too
    aligned          integer arguments that are multiples of 16
    options          number of warps and so on
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]


@dataclass
class Recorder:
    """Records launches instead of launching.

    unique   a launch of each kind; the value is how often it was launched
    """

    unique: dict[Launch, int] = field(default_factory=dict)

    def launch(self, kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        """Check the arguments of a launch, and record it."""
        name = kernel.fn.__name__
        assert len(grid) <= 3
        assert all(0 < size <= most for size, most in zip(grid, _MOST_PROGRAMS, strict=False)), (name, grid)
        names = kernel.arg_names
        given = dict(zip(names, args, strict=False))
        given |= {key: value for key, value in kwargs.items() if key in names}
        options = {key: value for key, value in kwargs.items() if key not in names}
        assert set(given) == set(names), (name, set(names) ^ set(given))
        # Triton warns where it is not given, and what a CPU computes too must not be fused.
        assert options["enable_fp_fusion"] in _fusions()[name], name
        unspecialised = kernel.kwargs.get("do_not_specialize") or ()
        signature, constants, aligned = {}, {}, []
        for key, value in given.items():
            if "constexpr" in str(kernel.fn.__annotations__[key]):
                constants[key] = value
            elif isinstance(value, torch.Tensor):
                signature[key] = self._pointer(name, key, value)
            else:
                assert type(value) is int, (name, key, value)
                assert -(2**31) <= value < 2**31, (name, key, value)
                if value == 1 and key not in unspecialised:
                    constants[key] = 1
                    continue
                signature[key] = "i32"
                if value % 16 == 0 and key not in unspecialised:
                    aligned.append(key)
        # An argument that is not used in a launch is given another one a second time.
        tensors = [id(value) for value in given.values() if isinstance(value, torch.Tensor)]
        _check_types(name, signature, {key for key in signature if tensors.count(id(given[key])) > 1})
        done = Launch(
            kernel.fn.__module__,
            name,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple(aligned),
            tuple(options.items()),
        )
        self.unique[done] = self.unique.get(done, 0) + 1

    def _pointer(self, kernel: str, name: str, tensor: torch.Tensor) -> str:
        assert tensor.device == CUDA, (kernel, name, tensor.device)
        assert tensor.is_contiguous() or name in _STRIDED.get(kernel, ()), (kernel, name, tensor.stride())
        assert tensor.dtype in _TYPES, (kernel, name, tensor.dtype)
        return _TYPES[tensor.dtype]

    def as_json(self) -> str:
        """Return the launches for `compile_launches`."""
        return json.dumps([asdict(launch) for launch in self.unique])


@functools.cache
def _fusions() -> dict[str, set[bool]]:
    """Return whether `variants()` allow each kernel to fuse multiplications and additions."""
    found: dict[str, set[bool]] = {}
    for module in MODULES:
        for variant in variants(module):
            found.setdefault(variant.kernel.fn.__name__, set()).add(variant.fp_fusion)
    return found


@functools.cache
def _families() -> dict[tuple[str, str], set[str]]:
    """Return the types that each argument of each kernel has in `variants()`."""
    found: dict[tuple[str, str], set[str]] = {}
    for module in MODULES:
        for variant in variants(module):
            for name, kind in variant.signature.items():
                found.setdefault((variant.kernel.fn.__name__, name), set()).add(kind)
    return found


def _check_types(kernel: str, signature: dict[str, str], placeholders: set[str]) -> None:
    """Check that arguments have the types which `variants()` names; any float type where that is a half.

    placeholders   arguments that are not checked
    """
    numbers = set()
    for name, kind in signature.items():
        family = _families()[kernel, name]
        if name in placeholders:
            continue
        if family & _HALF:
            assert kind in {*_HALF, "*fp32"}, (kernel, name, kind)
            if family <= _HALF:
                numbers.add(kind)
        else:
            assert kind in family, (kernel, name, kind, family)
    assert len(numbers) <= 1, (kernel, signature)


class _HostBuffer:
    """Stands for `cuda.HostBuffer`, with memory that is real."""

    def __init__(self, numbers: int, device: torch.device) -> None:
        assert device == CUDA
        self._array = np.zeros(numbers, np.int32)

    def array(self) -> Any:
        return self._array

    def copy_to(self, tensor: torch.Tensor, numbers: int) -> None:
        assert tensor.device == CUDA
        assert tensor.dtype is torch.int32
        assert tensor.is_contiguous()
        assert numbers <= len(self._array)
        assert numbers <= len(tensor)


class _Fetch:
    """Stands for `cuda.Fetch`: a result of zeros, with finite logits."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.device == CUDA
        assert tensor.dtype is torch.int32
        self._results = np.zeros(tuple(tensor.shape), np.int32)
        self._results[1:2] = 1

    def wait(self) -> torch.Tensor:
        return torch.from_numpy(self._results)


class FakePool:
    """Stands for `cuda.GraphPool`: capturing calls, and must compile nothing that warming up has not."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.captured = self.replayed = 0

    def waits(self, run: Callable[[], None]) -> str:
        run()
        run()
        return ""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        known = set(self._recorder.unique)
        run()
        assert set(self._recorder.unique) == known
        self.captured += 1

        def replay() -> None:
            self.replayed += 1

        return replay


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    assert tensor.device.type == "cpu"
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


@contextlib.contextmanager
def fake_cuda(
    monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int] = (9, 0), multiprocessors: int = 132
) -> Iterator[Recorder]:
    """Let tensors of CUDA be created in the block, and record launches. By default it looks like an H100."""
    recorder = Recorder()

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        return functools.partial(recorder.launch, kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", launcher)
    monkeypatch.setattr(cuda, "HostBuffer", _HostBuffer)
    for module in (cuda, likelihoods):
        monkeypatch.setattr(module, "Fetch", _Fetch)
    monkeypatch.setattr(cuda, "GraphPool", lambda device: FakePool(recorder))
    monkeypatch.setattr(cuda, "current_device", lambda device: contextlib.nullcontext())
    for module in (slots, sampler, likelihoods):
        monkeypatch.setattr(module, "to_device", _to_device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    mode = FakeTensorMode()
    mode.allow_meta = True
    with mode, torch.inference_mode():
        yield recorder


def fake_network(config: Any, dtype: torch.dtype, attention: str) -> Any:
    """Make a network of transformers whose weights are on the fake device; inside `fake_cuda`."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    # Not on the device at once: without CUDA, random numbers cannot be drawn there, not even fake ones.
    with unset_fake_temporarily(), torch.inference_mode(False), torch.device("meta"):
        network = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    made: dict[int, Any] = {}

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)

    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = torch.nn.Parameter(moved(parameter), requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)
    return network.eval()
