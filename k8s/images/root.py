"""Copy what a service needs of this system to an empty root: `python root.py FOLDER`.

That is the interpreter, the part of the standard library that services can use, the shared libraries of
these and those that wheels expect of every system, certificates, and users. There is no shell, no package
manager and no other program in it. The packages of Debian that files come from are recorded as in
distroless images, so that scanners find them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

UID = 10001
_ABSENT = (
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "pydoc_data",
    "__pycache__",
)
_ABSENT += ("site-packages", "dist-packages", "turtle.py")
# Modules for terminals, old databases and NIS would need a dozen packages of Debian, Kerberos among them.
_ABSENT_MODULES = ("_test", "_xxtest", "_xxsub", "_tkinter", "_curses", "_dbm", "_gdbm", "nis.", "readline.")
_ABSENT_MODULES += ("ossaudiodev", "spwd", "_crypt", "_ctypes_test")
# What manylinux allows wheels to expect (PEP 600), as far as wheels use it, and the resolver of host names.
_EXPECTED = ("libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1")
_EXPECTED += ("libutil.so.1", "libresolv.so.2", "libnss_dns.so.2", "libnss_files.so.2", "libz.so.1")
_FILES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/openssl.cnf", "/usr/lib/ssl/openssl.cnf")
_FILES += (
    "/etc/os-release",
    "/etc/debian_version",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/nsswitch.conf",
)
_FILES += ("/etc/gai.conf", "/etc/host.conf", "/etc/protocols", "/etc/services")


def main(root: Path) -> None:
    """Build the root."""
    for link in ("bin", "sbin", "lib", "lib64"):  # Debian's are links to /usr
        if Path("/", link).is_symlink():
            root.mkdir(parents=True, exist_ok=True)
            (root / link).symlink_to(os.readlink(Path("/", link)))
            (root / "usr" / Path(os.readlink(Path("/", link))).name).mkdir(parents=True, exist_ok=True)
    copied = list(_interpreter(root))
    copied += [copy(path, root) for path in _libraries(copied)]
    for name in _FILES:
        if Path(name).is_dir():
            copied += [copy(file, root) for file in Path(name).iterdir()]
        elif Path(name).exists():
            copied.append(copy(Path(name), root))
    _folders_and_users(root)
    _record_packages(copied, root)
    subprocess.run(["ldconfig", "-r", root, "-X"], check=True)
    shutil.rmtree(root / "var/cache/ldconfig", ignore_errors=True)


def copy(path: Path, root: Path) -> Path:
    """Copy a file to the same place in the root, and what a link points to, too. Returns its real path."""
    real = path.resolve()
    inside = root / real.relative_to("/")
    if not inside.exists():
        inside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(real, inside)
    place = Path(os.path.realpath(path.parent), path.name)
    link = root / place.relative_to("/")
    if place != real and not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(real)
    return real


def _interpreter(root: Path) -> Iterator[Path]:
    executable = Path(sys.executable).resolve()
    yield copy(executable, root)
    for name in ("python", "python3"):
        link = root / executable.relative_to("/").with_name(name)
        link.unlink(missing_ok=True)
        link.symlink_to(executable.name)
    for library in sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}):
        for folder, folders, files in os.walk(library):
            folders[:] = sorted(f for f in folders if f not in _ABSENT and not f.startswith("config-"))
            for name in sorted(files):
                if name not in _ABSENT and not name.startswith(_ABSENT_MODULES):
                    yield copy(Path(folder, name), root)


def _libraries(files: Iterable[Path]) -> list[Path]:
    """Return the shared libraries that the files need, and those that wheels expect."""
    binaries = [file for file in files if file.suffix == ".so" or os.access(file, os.X_OK)]
    found = {Path(line) for line in re.findall(r"/\S+(?= \(0x)", _output("ldd", *binaries, fails=True))}
    known = dict(re.findall(r"\t(\S+) .*=> (\S+)", _output("ldconfig", "-p")))
    expected = [Path(known[name]) for name in _EXPECTED if name in known]
    # Each expected library may need others.
    found |= {Path(line) for line in re.findall(r"/\S+(?= \(0x)", _output("ldd", *expected))}
    return sorted({*found, *expected})


def _folders_and_users(root: Path) -> None:
    for name in ("proc", "sys", "dev", "run", "etc", "opt/headrace", "var/lib"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("tmp", "var/tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(0o1777)
    cache = root / "var/cache/headrace"
    cache.mkdir(parents=True)
    os.chown(cache, UID, UID)
    etc = root / "etc"
    etc.joinpath("passwd").write_text(
        f"root:x:0:0:root:/root:/sbin/nologin\nheadrace:x:{UID}:{UID}:headrace:/tmp:/sbin/nologin\n"
    )
    etc.joinpath("group").write_text(f"root:x:0:\nheadrace:x:{UID}:\n")


def _record_packages(files: list[Path], root: Path) -> None:
    """Write var/lib/dpkg/status.d/PACKAGE for the packages that have one of the files."""
    names = {str(file) for file in files}
    names |= {name.removeprefix("/usr") for name in names if name.startswith("/usr/lib")}  # as /usr merged
    lines = _output("dpkg", "-S", *sorted(names), fails=True).splitlines()
    packages = {line.split(": ")[0].split(",")[0] for line in lines if not line.startswith("diversion")}
    folder = root / "var/lib/dpkg/status.d"
    folder.mkdir(parents=True)
    for package in sorted(packages):
        folder.joinpath(package.split(":")[0]).write_text(_output("dpkg", "-s", package))


def _output(*command: object, fails: bool = False) -> str:
    """Return the output of a program. *fails*: it fails for some of its arguments, and reports the others."""
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    if done.returncode and not fails:
        raise SystemExit(f"{command[0]} failed")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
