"""Code that comes with a model is never run, and no prompt asks whether to run it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_call_that_reads_model_files_passes_trust_remote_code() -> None:
    """Without the argument transformers asks on a terminal, and its default may change."""
    reads = []
    for path in [*ROOT.glob("services/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
                "from_pretrained",
                "from_config",
            ):
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                value = given.get("trust_remote_code")
                trusted = not (isinstance(value, ast.Constant) and value.value is False)
                reads.append((f"{path.relative_to(ROOT)}:{node.lineno}", trusted))

    assert [place for place, trusted in reads if trusted] == []
    assert len(reads) >= 9
