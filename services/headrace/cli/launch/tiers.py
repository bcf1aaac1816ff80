"""Read the tiers of a mesh from the command line: which engine computes each, or which service answers it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from headrace import models

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Engine = Literal["torch", "vllm", "upstream"]
API_KEY_FILE = "HEADRACE_API_KEY_FILE"
_VLLM = "vllm:"
_FORMS = (
    f"write NAME=MODEL, for example small={models.SMALL} or small=/path/to/model.gguf, NAME=vllm:MODEL for "
    "vLLM, or NAME=MODEL@URL for a service with OpenAI's API"
)


class BadSpec(Exception):
    """The requested mesh is not possible. The message states why."""


@dataclass(frozen=True)
class TierSpec:
    """A tier: its name and the model it serves, as the user wrote it.

    engine   what computes: our engine (torch), vLLM, or another service (upstream)
    url      of an upstream: one base URL, or several separated by commas
    """

    name: str
    model: str = ""
    engine: Engine = "torch"
    url: str = ""

    @property
    def computes(self) -> bool:
        """Whether the tier has workers of its own."""
        return self.engine != "upstream"

    def described(self, *, fake: bool = False) -> str:
        """Describe engine and model in a few words."""
        if self.engine == "upstream":
            return f"{self.model} at {self.url}"
        if fake:
            return "echo"
        return self.model if self.engine == "torch" else f"{self.model} on vLLM"


DEFAULT_TIERS = (TierSpec("small", models.SMALL), TierSpec("large", models.LARGE))


def parse_tier(text: str, *, fake: bool = False) -> TierSpec:
    """Read NAME=MODEL, NAME=vllm:MODEL or NAME=MODEL@URL; with *fake* also NAME alone. Raises BadSpec."""
    name, _, rest = (piece.strip() for piece in text.partition("="))
    if not re.fullmatch(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", name):
        raise BadSpec(
            f"--tier {text!r}: {name!r} is not a valid name of a tier; use a-z, 0-9, '.', '_' and '-'"
        )
    model, at, url = re.match(r"(.*?)(?:(@)(https?://.*))?$", rest, re.DOTALL).groups()  # type: ignore[union-attr] # it matches everything
    vllm = model.startswith(_VLLM)
    if at:
        if vllm:
            raise BadSpec(f"--tier {text!r}: a tier is on vLLM or at a URL; leave out 'vllm:' or '@{url}'")
        if not model:
            raise BadSpec(
                f"--tier {text!r} has no model; write {name}=MODEL@URL, with the upstream's name of it"
            )
        return TierSpec(name, model, "upstream", ",".join(_checked(text, each) for each in url.split(",")))
    if not model.removeprefix(_VLLM) and not fake:
        raise BadSpec(f"--tier {text!r} has no model; {_FORMS}")
    _, hint, host = model.rpartition("@")
    if hint and re.match(r"[\w.-]+(:\d+)?(/|$)", host) and not Path(model.removeprefix(_VLLM)).exists():
        raise BadSpec(f"--tier {text!r}: the URL after '@' begins with http:// or https://")
    return TierSpec(name, model.removeprefix(_VLLM), "vllm" if vllm else "torch")


def _checked(text: str, url: str) -> str:
    """Return one URL of an upstream, without a slash at its end. Raises BadSpec."""
    url = url.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise BadSpec(f"--tier {text!r}: {url!r} is not a URL such as https://api.openai.com/v1")
    if parts.username or parts.password:
        # Without the text, which has the key, and would be in logs.
        raise BadSpec(
            f"--tier {text.partition('=')[0]}: a key does not belong into the URL; write it to a file, and "
            "name the file in HEADRACE_API_KEY_FILE"
        )
    if parts.query or parts.fragment:
        raise BadSpec(f"--tier {text!r}: {url!r} is not a base URL; it has a query or fragment")
    return url


def require_one_provider(tiers: Sequence[TierSpec], variables: Mapping[str, str]) -> None:
    """Raise BadSpec if the one key of the environment would be sent to several hosts."""
    hosts = {urlsplit(url).netloc for tier in tiers for url in tier.url.split(",") if url}
    if variables.get(API_KEY_FILE) and len(hosts) > 1:
        raise BadSpec(
            f"{API_KEY_FILE} has one key, which would be sent to {' and '.join(sorted(hosts))}; start an "
            "upstream for each with `python -m headrace.upstream`, or unset it if they need no key"
        )


def parse_tiers(texts: Sequence[str], *, fake: bool = False) -> Sequence[TierSpec]:
    """Read all --tier flags, smallest tier first; without any, the two default tiers. Raises BadSpec."""
    tiers = [parse_tier(text, fake=fake) for text in texts]
    names = [tier.name for tier in tiers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadSpec(f"--tier has {', '.join(twice)} more than once")
    return tiers or DEFAULT_TIERS
