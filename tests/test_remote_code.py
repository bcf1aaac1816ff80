"""Code that comes with a model is never run, nor is anybody asked whether it should be."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_whatever_reads_a_models_files_says_that_their_code_is_not_trusted() -> None:
    """Left out, transformers asks on a terminal, and a default may change."""
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
