"""Read the limits of tenants from a file, and again when it changes.

The file is TOML, or JSON with the same names if its name ends in .json:

    [default]                    # of tenants that are not named here and have no class
    requests_per_minute = 600

    [classes.gold]               # of credentials with the quota `gold`, and of tenants below
    requests_per_minute = 6000
    tokens_per_minute = 2_000_000
    concurrent_streams = 64
    cost_per_day = 20.0
    max_priority = 7

    [tenants.acme]
    class = "gold"
    concurrent_streams = 128     # in place of that of the class

A limit that is absent does not apply. A class does not inherit from `default`.
"""

from __future__ import annotations

import json
import logging
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace.quoting import quoted
from headrace.runtime.security.identity import MAX_PRIORITY
from headrace.runtime.security.watched_file import stamp_of

log = logging.getLogger(__name__)

DEFAULT = "default"
MAX_REPORTED = 100  # classes that are not listed; issuers of JWTs may name any
MAX_LIMIT = 1e15
_WHOLE = ("requests_per_minute", "concurrent_streams")
_NUMBERS = ("requests_per_minute", "tokens_per_minute", "concurrent_streams", "cost_per_day")


class BadQuotas(Exception):
    """The file of limits cannot be used. The message names the file and all problems."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one tenant; infinity for those that do not apply.

    name    of the class
    apply   whether any of them limits the use; the priority does not
    """

    name: str = DEFAULT
    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf
    concurrent_streams: float = math.inf
    cost_per_day: float = math.inf
    max_priority: int = MAX_PRIORITY
    apply: bool = field(init=False)

    def __post_init__(self) -> None:
        # Every request asks for it.
        object.__setattr__(self, "apply", any(getattr(self, name) != math.inf for name in _NUMBERS))

    @property
    def tenant_class(self) -> str:
        """The class as metrics name it."""
        return "" if self.name == DEFAULT else self.name


class Rules:
    """The limits of all tenants.

    Raises BadQuotas if the file is not usable at the start.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._stamp: object = None
        self._default = Limits()
        self._classes: dict[str, Limits] = {}
        self._tenants: dict[str, Limits] = {}
        self._unknown: set[str] = set()  # classes that were reported
        if path is not None:
            self._stamp = stamp_of(path)
            self._read(path)

    def limits(self, tenant: str, quota: str) -> Limits:
        """Return the limits of a tenant: its own, or those of the class *quota*, or the default ones."""
        found = self._tenants.get(tenant) or self._classes.get(quota)
        if found is None and quota and self._path is not None:
            self._report(quota)
        return found or self._default

    def _report(self, quota: str) -> None:
        """Log that credentials have a class that is not listed; once for each, and not for any number."""
        if quota not in self._unknown and len(self._unknown) < MAX_REPORTED:
            self._unknown.add(quota)
            log.warning("class of quotas not listed, the default limits apply", extra={"class": quota})

    @property
    def limit_cost(self) -> bool:
        """Whether any tenant has a budget of cost."""
        every = (self._default, *self._classes.values(), *self._tenants.values())
        return any(limits.cost_per_day != math.inf for limits in every)

    def refresh(self) -> bool:
        """Read the file again if it has changed; return whether the limits may have changed.

        A file that is not usable is logged and changes nothing.
        """
        if self._path is None or (stamp := stamp_of(self._path)) == self._stamp:
            return False
        self._stamp = stamp
        try:
            self._read(self._path)
        except BadQuotas as error:
            log.error("quotas not usable, keeping the old ones", extra={"problem": str(error)})
            return False
        log.info("quotas read", extra={"classes": len(self._classes), "tenants": len(self._tenants)})
        return True

    def _read(self, path: Path) -> None:
        found = _load(path)
        problems: list[str] = []
        classes = {
            str(name): _limits(table, Limits(str(name)), f"classes.{name}", problems)
            for name, table in _table(found.pop("classes", {}), "classes", problems).items()
        }
        default = _limits(found.pop(DEFAULT, {}), Limits(), DEFAULT, problems)
        classes.setdefault(DEFAULT, default)
        tenants = {}
        for name, table in _table(found.pop("tenants", {}), "tenants", problems).items():
            own = dict(_table(table, f"tenants.{name}", problems))
            base = own.pop("class", DEFAULT)
            if not isinstance(base, str) or base not in classes:
                problems.append(f"tenants.{name}: there is no class {quoted(str(base))}")
                continue
            tenants[str(name)] = _limits(own, classes[base], f"tenants.{name}", problems)
        problems += [f"{quoted(str(name))} is not default, classes or tenants" for name in found]
        if problems:
            raise BadQuotas(f"{path}: {'; '.join(problems)}")
        self._default, self._classes, self._tenants = default, classes, tenants
        self._unknown.clear()


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise BadQuotas(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of either format, or not UTF-8
        raise BadQuotas(f"{path} cannot be parsed: {error}") from error
    if not isinstance(found, dict):
        raise BadQuotas(f"{path} is not a table")
    return found


def _table(value: object, place: str, problems: list[str]) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    problems.append(f"{place} is not a table")
    return {}


def _limits(value: object, base: Limits, place: str, problems: list[str]) -> Limits:
    """Return *base* with the limits of a table."""
    found: dict[str, Any] = {}
    for name, number in _table(value, place, problems).items():
        if name == "max_priority":
            valid = type(number) is int and 0 <= number <= MAX_PRIORITY
        elif name in _NUMBERS:
            valid = type(number) in (int, float) and 0 <= number <= MAX_LIMIT
            # Less than one would admit nothing, as 0 does, but tell callers to try again.
            valid = valid and not (0 < number < 1 and name in _WHOLE)
        else:
            problems.append(f"{place}: {quoted(str(name))} is not a limit")
            continue
        if not valid:
            problems.append(f"{place}: {name} is {quoted(repr(number))}, not a number that is allowed")
        found[name] = number
    return replace(base, **found)
