"""Files and folders stay small enough to read, and the report counts what is there."""

from __future__ import annotations

from pathlib import Path

from tests.structure import HERE, cycle, folders, report, totals

MAX_LINES = 400
MAX_MODULES = 14


def test_no_file_and_no_folder_of_services_outgrows_its_limit() -> None:
    read = folders(HERE)

    print(*report(read), sep="\n")  # shown by pytest -s
    too_many = {folder.name: len(folder.modules) for folder in read if len(folder.modules) > MAX_MODULES}
    too_long = {
        module.name: module.lines for folder in read for module in folder.modules if module.lines > MAX_LINES
    }
    assert not too_many
    assert not too_long


def test_no_room_of_services_is_in_an_import_cycle() -> None:
    assert not cycle(folders(HERE))


def test_the_report_counts_modules_functions_and_imports(tmp_path: Path) -> None:
    package = tmp_path / "services" / "headrace"
    for name, text in {
        "__init__.py": "",
        "errors.py": "class Lost(Exception):\n    pass\n",
        "v1/__init__.py": "",
        "v1/stub_pb2.py": "x = 1\n",
        "router/__init__.py": "",
        "router/service.py": (
            "from headrace import errors\n"
            "from headrace.v1 import stub_pb2\n"
            "import json\n\n"
            "async def answer():\n"
            "    def inner():\n        from headrace.router.state import tiers\n"
            "    raise errors.Lost\n"
        ),
        "router/state/__init__.py": "",
        "router/state/tiers.py": "from headrace.router.service import answer\n",
    }.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    read = {folder.name: folder for folder in folders(tmp_path)}

    assert list(read) == ["headrace", "headrace.router", "headrace.router.state"]
    router = read["headrace.router"]
    assert (router.lines, router.longest_function) == (8, ("service.answer", 4))
    assert router.imports == ["headrace", "headrace.router.state", "headrace.v1"]
    assert read["headrace.router.state"].imports == ["headrace.router"]
    assert set(cycle(list(read.values()))) == {"headrace.router.service", "headrace.router.state"}
    assert totals(list(read.values()))["imports between folders"] == 4
