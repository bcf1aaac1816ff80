"""Read a model's recommended sampling fields from the generation_config.json in its folder."""

from __future__ import annotations

from pathlib import Path

from headrace import errors
from headrace.models import ModelUnavailable
from headrace.models.tokenizers.files import read_json
from headrace.v1 import generation_pb2 as pb
from headrace.validation import check_sampling

FILE = "generation_config.json"
_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def recommended_sampling(path: Path) -> pb.Sampling:
    """Return the recommended fields of the model at *path*; none for a .gguf, which has no such file.

    Raises ModelUnavailable for values that are invalid in a request.
    """
    file = path / FILE
    recommended = read_json(file) if path.is_dir() else None
    if not isinstance(recommended, dict):
        recommended = {}
    sampling = pb.Sampling()
    for name in _FIELDS:
        if (value := recommended.get(name)) is not None:
            try:
                # In some files -1 stands for all tokens.
                setattr(sampling, name, max(value, 0) if name == "top_k" else value)
                check_sampling(sampling)
            except (TypeError, ValueError, errors.InvalidSampling) as error:
                raise ModelUnavailable(
                    f"{file} has {name} = {value!r}, which is invalid in a request ({error}): correct it, or "
                    "set --generation-config none"
                ) from error
    return sampling
