"""Write values of a request as JSON again, within limits, so that the event loop is not blocked for long."""

from __future__ import annotations

from pydantic_core import to_json

from headrace.gateway.api.reading import invalid


def bounded_json(value: object, name: str, most: int, *, large: bool) -> str:
    """Return *value*, of a parsed body, as JSON without spaces; objects keep the order of their properties.

    name    of the parameter, for the error
    large   whether the body is large: then the size is estimated first. That takes ten times as long as to
            write it, but other threads run meanwhile: while megabytes are written, none does for 50 ms

    Raises Problem for more than *most* bytes.
    """
    try:
        data = b"" if large and _exceeds(value, most) else to_json(value)
    except ValueError as error:
        raise invalid(name, f"has a value that cannot be passed on: {error}") from None
    if not 0 < len(data) <= most:
        raise invalid(name, f"has more than {most} bytes as JSON: shorten it")
    return data.decode()


def _exceeds(value: object, most: int) -> bool:
    """Return whether the JSON of *value* certainly has more than *most* bytes. Stops where it is known."""
    left, size = [value], 0
    while left:
        one = left.pop()
        size += 1
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, list | dict):
            size += len(one)
            if size > most:  # before its elements are copied
                return True
            if isinstance(one, dict):
                size += sum(map(len, one))
                left.extend(one.values())
            else:
                left.extend(one)
        if size > most:
            return True
    return False
