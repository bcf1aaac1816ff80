"""`headrace token new` adds callers to a file that the services read."""

from __future__ import annotations

import re
import time
from pathlib import Path

from typer.testing import CliRunner

from headrace.cli.__main__ import app
from headrace.runtime.security.callers_file import parse


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["token", "new", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_a_new_token_is_printed_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "callers.toml"
    _, first, _ = run("search", "--file", str(path))
    _, second, _ = run(
        *("ops", "--file", str(path), "--tenant", "*", "--scope", "admin", "--max-priority", "9"),
        *("--quota", "gold", "--days", "2"),
    )

    file = parse(path.read_bytes())
    identity = file.identify(first.strip(), time.time())
    assert (identity.name, identity.tenant, identity.max_priority) == ("search", "search", 5)
    admin = file.identify(second.strip(), time.time() + 86_400)
    assert (admin.tenant, sorted(admin.scopes), admin.max_priority) == (None, ["admin"], 9)
    assert admin.quota == "gold"
    assert first.strip() not in path.read_text()
    assert path.stat().st_mode & 0o007 == 0


def test_without_a_file_the_entry_is_printed_apart_from_the_token() -> None:
    code, out, err = run("search")

    assert code == 0
    token = out.strip()
    assert re.fullmatch(r"hr_[\w-]{43}", token)
    entry = err[err.index("[[tokens]]") :]
    assert parse(entry.encode()).identify(token, 0.0).name == "search"
    assert token not in err


def test_a_file_that_is_wrong_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "callers.toml"
    path.write_text("[[tokens]]\n")

    code, out, err = run("search", "--file", str(path))

    assert (code, out) == (2, "")
    assert f"{path}: tokens[0]" in err
    assert path.read_text() == "[[tokens]]\n"


def test_an_unknown_scope_is_refused() -> None:
    code, out, err = run("search", "--scope", "root")

    assert (code, out) == (2, "")
    assert "scopes must be a list" in err
