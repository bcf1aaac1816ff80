"""Read the files of a tokenizer, and say in one line which of them is wrong and what to do.

transformers reads them, without running code that comes with a model. What it makes of a `tokenizer.model`
is compared with what SentencePiece itself makes of some texts.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.models import ModelUnavailable, tokenizer_fingerprint

log = logging.getLogger(__name__)

_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_OTHERS = ("tokenizer.model", "merges.txt", "chat_template.jinja")
_LFS = b"version https://git-lfs"
_SAMPLES = ("Hello world", "the sky\nis", "a  b", "x = {'é': [1, 23]};", "日本 🗼 tail")
_COPY = "copy the model's tokenizer files again"


@dataclass(frozen=True)
class TokenizerFiles:
    """What a model's files say of its tokenizer.

    backend         the `tokenizers.Tokenizer`
    templates       its chat templates by name; "default" where there is but one without a name
    special_tokens  special tokens by what they are for, such as bos_token
    """

    backend: Any
    templates: Mapping[str, str]
    special_tokens: Mapping[str, Any]
    fingerprint: str


def read_tokenizer(path: Path, cache: Path) -> TokenizerFiles:
    """Read the tokenizer of the model at *path*, a folder or a .gguf file.

    cache   where the tokenizer taken out of a .gguf is kept: taking it out costs seconds

    Raises ModelUnavailable for files that hold no usable tokenizer.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()  # its lines go where ours go
    transformers_logging.enable_propagation()
    folder = path if path.is_dir() else None
    if folder is not None:
        _check_files(folder)
    fingerprint = tokenizer_fingerprint(path)
    if folder is None:
        folder = cache / "tokenizers" / fingerprint
        if not folder.exists():
            _keep(_read(path, lambda: _from_gguf(path)), folder)
    tokenizer = _read(path, lambda: _from_folder(folder))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelUnavailable(
            f"the tokenizer in {path} is a {type(tokenizer).__name__}, which has no fast form: convert it to "
            "a tokenizer.json"
        )
    template = tokenizer.chat_template
    templates = template if isinstance(template, dict) else {"default": template} if template else {}
    return TokenizerFiles(backend, templates, dict(tokenizer.special_tokens_map), fingerprint)


def _read(path: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ModelUnavailable:
        raise
    except BaseException as error:  # of Rust, what it panics with is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise _with_code(path) from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ModelUnavailable(
            f"the tokenizer in {path} cannot be read ({type(error).__name__}: {reason[:300]}): {_COPY}, or "
            "give another model"
        ) from error


def _from_folder(folder: Path) -> Any:
    """The tokenizer of a folder; what names no kind is read as what its files are most often."""
    from transformers import AutoTokenizer, GPT2Tokenizer
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    kind: Any = AutoTokenizer
    sentences = None
    if not (folder / "tokenizer.json").is_file():
        settings = read_json(folder / "tokenizer_config.json") or {}
        named = settings.get("tokenizer_class")
        if "auto_map" in settings and tokenizer_class_from_name(named or "") is None:
            raise _with_code(folder)
        if (folder / "tokenizer.model").is_file():
            sentences = _sentencepiece(folder / "tokenizer.model")
            if not named and sentences is not None:
                return _from_sentencepiece(folder, sentences)
        elif not named and not _names_a_tokenizer(folder):
            kind = GPT2Tokenizer
    tokenizer = kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if sentences is not None:
        _compare(tokenizer.backend_tokenizer, sentences, folder / "tokenizer.model")
    return tokenizer


def _names_a_tokenizer(folder: Path) -> bool:
    """Whether config.json names a model whose tokenizer is made of vocab.json and merges.txt."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    model_type = (read_json(folder / "config.json") or {}).get("model_type")
    name = TOKENIZER_MAPPING_NAMES.get(model_type) if model_type else None
    return "merges_file" in getattr(tokenizer_class_from_name(name or ""), "vocab_files_names", {})


def _sentencepiece(path: Path) -> Any:
    """SentencePiece's own reading of *path*; None if that is a file of tiktoken's."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        with path.open("rb") as file:
            if len(file.readline().split()) == 2:  # a token in base64, and its rank
                return None
        raise ModelUnavailable(f"{path} is damaged, or no SentencePiece model: {_COPY}") from error


def _from_sentencepiece(folder: Path, sentences: Any) -> Any:
    """The tokenizer of a folder with a tokenizer.model that names no kind: as that file says itself.

    transformers reads its tokens, but takes how it treats blanks from a kind.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    protos: Any = sentencepiece_model_pb2
    rules = protos.ModelProto.FromString((folder / "tokenizer.model").read_bytes()).normalizer_spec
    fast = tokenizer.backend_tokenizer
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    fast.pre_tokenizer = None
    ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence(
        [*ends, *([decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else [])]
    )
    _compare(fast, sentences, folder / "tokenizer.model")
    if sentences.bos_id() >= 0:
        name = sentences.id_to_piece(sentences.bos_id())
        fast.post_processor = processors.TemplateProcessing(f"{name} $A", None, [(name, sentences.bos_id())])
    return tokenizer


def _compare(fast: Any, sentences: Any, path: Path) -> None:
    for text in _SAMPLES:
        if fast.encode(text, add_special_tokens=False).ids != sentences.encode(text):
            raise ModelUnavailable(
                f"{path} splits text in another way than its tokenizer_class would, or than can be told from "
                f"it (seen with {text!r}): convert it to a tokenizer.json"
            )


def _with_code(path: Path) -> ModelUnavailable:
    return ModelUnavailable(
        f"the tokenizer in {path} is code that came with it (auto_map in tokenizer_config.json), which is "
        "not run here: give a model whose tokenizer is a tokenizer.json"
    )


def _from_gguf(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False, local_files_only=True
    )


def _check_files(folder: Path) -> None:
    """Refuse files that are no such files, before anybody else stumbles over them."""
    for name in (*_JSON, *_OTHERS):
        file = folder / name
        if not file.is_file():
            continue
        try:
            with file.open("rb") as opened:
                start = opened.read(len(_LFS))
        except OSError as error:
            raise ModelUnavailable(f"cannot read {file}: {error.strerror}") from error
        if start == _LFS:
            raise ModelUnavailable(
                f"{file} is a pointer of git-lfs, not the file: run `git lfs pull` in {folder}"
            )
        if not start:
            raise ModelUnavailable(f"{file} is empty: {_COPY}")
        if name in _JSON:
            read_json(file)


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelUnavailable(f"{path} is damaged, it is not JSON ({error}): {_COPY}") from error


def _keep(tokenizer: Any, folder: Path) -> None:
    """Save whole or not at all: another batcher may be doing the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
    try:
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # else somebody was quicker
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
