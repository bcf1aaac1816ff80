"""Read the files of a tokenizer, and report in one line which file is invalid and how to fix it.

transformers reads the files, without running code that comes with a model. The tokenizer that it builds from
a `tokenizer.model` is compared with SentencePiece itself on some texts.
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

import tokenizers

from headrace.models import FINGERPRINT_FILE, ModelUnavailable, tokenizer_fingerprint
from headrace.models.tokenizers import cache as kept_tokenizers
from headrace.models.tokenizers import gguf

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
    """The tokenizer in a model's files.

    backend         the `tokenizers.Tokenizer`
    templates       its chat templates by name; a single one without a name is "default"
    special_tokens  special tokens by purpose, such as bos_token
    """

    backend: Any
    templates: Mapping[str, str]
    special_tokens: Mapping[str, Any]
    fingerprint: str


def read_tokenizer(path: Path, cache: Path) -> TokenizerFiles:
    """Read the tokenizer of the model at *path*, a folder or a .gguf file.

    cache   the folder for parsed tokenizers, because parsing takes seconds; see `cache`

    Raises ModelUnavailable for files without a usable tokenizer.
    """
    if path.is_dir():
        _check_files(path)
    fingerprint = tokenizer_fingerprint(path)
    kept = kept_tokenizers.location(path, cache)
    if (contents := kept_tokenizers.load(kept)) is not None:
        backend = _read(path, lambda: tokenizers.Tokenizer.from_str(contents.backend))
        return TokenizerFiles(backend, contents.templates, contents.special_tokens, fingerprint)
    files = _read_afresh(path, cache / "tokenizers" / fingerprint, fingerprint)
    kept_tokenizers.keep(
        kept_tokenizers.Contents(files.backend.to_str(), files.templates, files.special_tokens), kept
    )
    return files


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of the .gguf file *path* into *folder*, which is made if it does not exist.

    The folder then states the fingerprint of the file. Raises ModelUnavailable for a tokenizer that cannot be
    read.
    """
    with tempfile.TemporaryDirectory() as cache:
        fingerprint = read_tokenizer(path, Path(cache)).fingerprint
        shutil.copytree(Path(cache, "tokenizers", fingerprint), folder, dirs_exist_ok=True)
    folder.chmod(0o755)  # other users read it: that of a container
    (folder / FINGERPRINT_FILE).write_text(f"{fingerprint}\n")


def _read_afresh(path: Path, unpacked: Path, fingerprint: str) -> TokenizerFiles:
    """Have transformers read the tokenizer.

    unpacked   the folder for the tokenizer taken out of a .gguf
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()  # its log lines go to our handlers
    transformers_logging.enable_propagation()
    if path.is_dir():
        unpacked = path
    elif not unpacked.exists():
        _save(_read(path, lambda: _from_gguf(path)), unpacked)
    tokenizer = _read(path, lambda: _from_folder(unpacked))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelUnavailable(
            f"the tokenizer in {path} is a {type(tokenizer).__name__}, which has no fast version: convert it "
            "to a tokenizer.json"
        )
    template = tokenizer.chat_template
    templates = template if isinstance(template, dict) else {"default": template} if template else {}
    return TokenizerFiles(backend, templates, dict(tokenizer.special_tokens_map), fingerprint)


def _read(path: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ModelUnavailable:
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise _runs_code(path) from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ModelUnavailable(
            f"the tokenizer in {path} cannot be read ({type(error).__name__}: {reason[:300]}): {_COPY}, or "
            "give another model"
        ) from error


def _from_folder(folder: Path) -> Any:
    """Return the tokenizer of a folder; files that name no kind are read as their most common kind."""
    from transformers import AutoTokenizer, GPT2Tokenizer
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    kind: Any = AutoTokenizer
    sentences = None
    if not (folder / "tokenizer.json").is_file():
        settings = read_json(folder / "tokenizer_config.json") or {}
        named = settings.get("tokenizer_class")
        if "auto_map" in settings and tokenizer_class_from_name(named or "") is None:
            raise _runs_code(folder)
        if (folder / "tokenizer.model").is_file():
            sentences = _sentencepiece(folder / "tokenizer.model")
            if not named and sentences is not None:
                return _from_sentencepiece(folder, sentences)
        elif not named and not _names_a_tokenizer(folder):
            kind = GPT2Tokenizer
    tokenizer = kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if sentences is not None:
        _check_against_sentencepiece(tokenizer.backend_tokenizer, sentences, folder / "tokenizer.model")
    return tokenizer


def _names_a_tokenizer(folder: Path) -> bool:
    """Return whether config.json names a model whose tokenizer consists of vocab.json and merges.txt."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    model_type = (read_json(folder / "config.json") or {}).get("model_type")
    name = TOKENIZER_MAPPING_NAMES.get(model_type) if model_type else None
    return "merges_file" in getattr(tokenizer_class_from_name(name or ""), "vocab_files_names", {})


def _sentencepiece(path: Path) -> Any:
    """Return SentencePiece's own tokenizer of *path*; None if the file is tiktoken's."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        with path.open("rb") as file:
            if len(file.readline().split()) == 2:  # a token in base64 and its rank
                return None
        raise ModelUnavailable(f"{path} is damaged or not a SentencePiece model: {_COPY}") from error


def _from_sentencepiece(folder: Path, sentences: Any) -> Any:
    """Return the tokenizer of a folder with a tokenizer.model that names no kind, by the rules in that file.

    transformers reads the tokens of such a file, but derives the treatment of spaces from the kind.
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
    _check_against_sentencepiece(fast, sentences, folder / "tokenizer.model")
    if sentences.bos_id() >= 0:
        name = sentences.id_to_piece(sentences.bos_id())
        fast.post_processor = processors.TemplateProcessing(f"{name} $A", None, [(name, sentences.bos_id())])
    return tokenizer


def _check_against_sentencepiece(fast: Any, sentences: Any, path: Path) -> None:
    for text in _SAMPLES:
        if fast.encode(text, add_special_tokens=False).ids != sentences.encode(text):
            raise ModelUnavailable(
                f"{path} splits text differently from its tokenizer_class, or from the rules that could be "
                f"read from it (for example {text!r}): convert it to a tokenizer.json"
            )


def _runs_code(path: Path) -> ModelUnavailable:
    return ModelUnavailable(
        f"the tokenizer in {path} is code that came with the model (auto_map in tokenizer_config.json), "
        "which is not run here: give a model with a tokenizer.json"
    )


def _from_gguf(path: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    if hasattr(gguf_tokenizer_mapping, "convert_gguf_tokenizer"):
        return gguf.from_gguf(path)
    # transformers 5.17 has this elsewhere, and needs the packages `torch` and `gguf` for it.
    return AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False, local_files_only=True
    )


def _check_files(folder: Path) -> None:
    """Raise ModelUnavailable for files that are missing their content, before a library reads them."""
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
                f"{file} is a git-lfs pointer and not the file itself: run `git lfs pull` in {folder}"
            )
        if not start:
            raise ModelUnavailable(f"{file} is empty: {_COPY}")
        if name in _JSON:
            read_json(file)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if the file does not exist."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelUnavailable(f"{path} is damaged and not valid JSON ({error}): {_COPY}") from error


def _save(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer atomically: another batcher may be saving it, too."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
    try:
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
