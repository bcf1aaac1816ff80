"""The committed stubs match protos/, and an install without extras has few dependencies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_committed_stubs_match_the_protos(tmp_path: Path) -> None:
    command = ["make", "--silent", "protos", f"OUT={tmp_path}", "--assume-old=.venv/.installed"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*")}
    committed = {
        path.relative_to(ROOT / "services"): path.read_text()
        for path in (ROOT / "services/headrace/v1").glob("*_pb2*")
        if path.suffix in (".py", ".pyi")
    }

    assert fresh.keys() == committed.keys(), "run `make protos`"
    assert [str(path) for path in fresh if fresh[path] != committed[path]] == [], "run `make protos`"


def test_the_bare_install_imports_only_what_it_declares() -> None:
    """`pip install headrace` alone provides stubs, errors and the client."""
    code = (
        "import sys, headrace.client, headrace.errors, headrace.v1.worker_service_pb2_grpc\n"
        "heavy = ['torch', 'transformers', 'pydantic', 'opentelemetry.sdk', 'typer', 'rich', 'uvloop', "
        "'numpy']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert loaded.stdout.strip() == "[]"
