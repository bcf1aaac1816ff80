"""The audit of dependencies finds advisories, and does not mistake silence for safety."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.deploy import tools
from tests.deploy.audit import CANARY, PINNED, audit, judged, pins


@contextmanager
def advisories(*vulnerable: tuple[str, str]) -> Iterator[str]:
    """Serve OSV's API with an advisory on each of *vulnerable*; return its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            name = asked["package"]["name"]
            found = {}
            if (name, asked["version"]) in vulnerable:
                affected = {
                    "package": {"name": name, "ecosystem": "PyPI"},
                    "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}],
                    "versions": [asked["version"]],
                }
                found = {"vulns": [{"id": f"TEST-{name}", "summary": "bad", "affected": [affected]}]}
            data = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()
        thread.join()


def test_an_advisory_on_a_pinned_version_is_found() -> None:
    tools.need("pip-audit")
    with advisories(CANARY, ("idna", "3.20")) as address:
        result = audit(
            [("idna", "3.20"), ("idna", "3.21"), ("six", "1.17")], "-s", "osv", "--osv-url", address
        )

    assert result.known
    assert result.found == ("idna 3.20: TEST-idna, fixed in 99.0",)


@pytest.mark.parametrize("serve", [True, False])
def test_a_service_without_advisories_is_not_taken_for_an_answer(serve: bool) -> None:
    """pip-audit itself reports "No known vulnerabilities found" for a mirror that has none."""
    tools.need("pip-audit")
    with advisories() as address:
        address = address if serve else "http://127.0.0.1:9/v1/query"
        result = audit([("idna", "3.20")], "-s", "osv", "--osv-url", address)

    assert not result.known
    assert result.problem


def test_an_advisory_is_waived_by_its_id() -> None:
    canary = {"name": CANARY[0], "version": CANARY[1], "vulns": [{"id": "X"}]}
    bad = {"name": "idna", "version": "1", "vulns": [{"id": "A-1", "aliases": ["CVE-1"], "fix_versions": []}]}

    assert judged({"dependencies": [canary, bad]}).found == ("idna 1: A-1, fixed in no version",)
    assert judged({"dependencies": [canary, bad]}, {"CVE-1": "not used"}).found == ()


def test_all_pinned_files_are_read() -> None:
    found = pins(path.read_text() for path in PINNED)

    assert len(PINNED) >= 5
    assert {"grpcio", "torch", "cryptography"} <= {name for name, _ in found}
    assert all(version[0].isdigit() for _, version in found)
