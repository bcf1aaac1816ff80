"""Start vLLM with a worker's settings, and describe the model that it loads."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from headrace.worker.engine.load.identity import weights_fingerprint
from headrace.worker.engine.load.refusals import LoadingError, one_line
from headrace.worker.engine.load.vocabulary import VocabularyReader
from headrace.worker.runner import ModelInfo, SamplingParams, SequenceSpec
from headrace.worker.settings import Settings
from headrace.worker.vllm.arguments import arguments, environment, with_file
from headrace.worker.vllm.drawing.end_ids import end_ids
from headrace.worker.vllm.drawing.exactness import find_difference
from headrace.worker.vllm.drawing.following import Structure
from headrace.worker.vllm.loop_thread import LoopThread
from headrace.worker.vllm.runner import VllmRunner

log = logging.getLogger(__name__)

TESTED = "0.32"  # the minor version of vLLM
INSTALL = f"pip install 'headrace[server]' 'vllm=={TESTED}.*'"

_FIRST_PROMPT = 16  # tokens
_CPU_SEQUENCES = 256  # vLLM's default of --max-num-seqs for each process; a step has at least as many tokens
# vLLM's steps of 4096 tokens take seconds on a CPU, and every answer waits for them.
_CPU_STEP_TOKENS = 512

FEATURES = ("logprobs", "top_logprobs", "prompt_logprobs")

Report = Callable[[str], None]  # receives one sentence


def require_vllm() -> None:
    """Raise LoadingError if vLLM is not installed. Imports nothing of it."""
    if importlib.util.find_spec("vllm") is None:
        raise LoadingError(f"--engine vllm needs vLLM; install it into an environment of its own: {INSTALL}")


def load_runner(
    settings: Settings,
    folder: Path,
    *,
    cache: Path,
    tokenizer_fingerprint: str,
    progress: Report,
    warn: Report,
) -> VllmRunner[Any]:
    """Start vLLM, load the model and return its runner; takes minutes.

    folder                  of the model
    cache                   folder for files that are made once, such as parsed tokenizers
    tokenizer_fingerprint   copied to `ModelInfo`
    progress                receives a short sentence before each step that takes time
    warn                    receives a sentence about each problem that does not prevent serving

    Raises LoadingError with a message of one line.
    """
    if folder.suffix == ".gguf":
        raise LoadingError(
            f"vLLM does not read {folder}: `headrace unpack` converts a .gguf file or a default model into a "
            "folder; or use --engine torch"
        )
    # vLLM reads them, also in the processes that it starts.
    debug = log.isEnabledFor(logging.DEBUG)
    os.environ.update(environment(os.environ, debug=debug))
    progress("importing vLLM")
    records = logging.getLogRecordFactory()
    version = _version(warn)
    if settings.exact:
        compute_rows_alike()
    thread = LoopThread("vllm")
    try:
        return thread.run(
            _load(
                settings,
                folder,
                thread,
                cache=cache,
                version=version,
                tokenizer_fingerprint=tokenizer_fingerprint,
                progress=progress,
                warn=warn,
            )
        )
    except BaseException:
        thread.stop(1.0)
        raise
    finally:
        logging.setLogRecordFactory(records)  # vLLM's adds the name of its process to the worker's lines


def compute_rows_alike() -> None:
    """Have vLLM compute a row alike alone and in a batch, on the devices where it can."""
    from vllm.platforms import current_platform

    # The kernels for that are written in Triton: on a CPU they fail in the first step.
    if not current_platform.is_cpu():
        os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")


def _version(warn: Report) -> str:
    """Import vLLM and return its version."""
    try:
        import vllm
    except ImportError as error:
        log.debug("vLLM cannot be imported", exc_info=True)
        raise LoadingError(
            f"--engine vllm needs vLLM, which cannot be imported here ({one_line(error)}); install it into "
            f"an environment of its own: {INSTALL}"
        ) from error
    version = str(vllm.__version__)
    if not version.startswith(f"{TESTED}."):
        warn(f"vLLM {version} is installed, but Headrace is tested with vLLM {TESTED}: others may fail")
    return version


async def _load(
    settings: Settings,
    folder: Path,
    thread: LoopThread,
    *,
    cache: Path,
    version: str,
    tokenizer_fingerprint: str,
    progress: Report,
    warn: Report,
) -> VllmRunner[Any]:
    from vllm.v1.engine.async_llm import AsyncLLM

    from headrace.worker.vllm.drawing.processor import NAME
    from headrace.worker.vllm.drawing.sampling import sampling_params
    from headrace.worker.vllm.steps import step_logger

    runner: VllmRunner[Any] | None = None

    def step(engine: int, scheduler: Any, iteration: Any) -> None:
        if runner is not None:
            runner.step(engine, scheduler, iteration)

    parsed = parse(arguments(settings, folder), cache=cache)
    drawing = NAME in (parsed.logits_processors or ())
    if not drawing:
        warn(
            "vLLM loads no logits processor of ours with speculative decoding or VLLM_USE_V2_MODEL_RUNNER=1: "
            "structured output, temperatures above 2, --exact, and resuming answers with presence or "
            "frequency penalty are not available"
        )
    vocabulary_reader = VocabularyReader(folder, cache) if drawing else None
    progress(f"starting vLLM {version}, which loads {settings.model}")
    try:
        engine = AsyncLLM.from_engine_args(parsed, stat_loggers=[step_logger(step)])
        tasks = await engine.get_supported_tasks()
    except Exception as error:
        log.debug("vLLM does not start", exc_info=True)
        raise LoadingError(f"vLLM cannot serve {settings.model}: {one_line(error)}") from error
    if "generate" not in tasks:
        engine.shutdown()
        raise LoadingError(f"{settings.model} generates no text: vLLM supports {', '.join(tasks)} with it")
    model = _model(
        engine.vllm_config,
        settings,
        folder,
        version=version,
        tokenizer_fingerprint=tokenizer_fingerprint,
        warn=warn,
    )
    progress(f"KV memory for {model.kv_tokens} tokens")
    grammars = None
    if vocabulary_reader is not None:
        vocabulary_reader.make(size=model.vocabulary_size, eos_ids=model.eos_ids)
        grammars = await asyncio.to_thread(vocabulary_reader.grammars, warn)
    if grammars is not None:
        model = replace(model, features=(*model.features, "structured"))
    parameters = partial(
        sampling_params,
        eos_ids=model.eos_ids,
        exact=settings.exact,
        vocabulary=model.vocabulary_size,
        drawing=drawing,
    )
    progress("computing a first answer")
    await _answer_once(engine, parameters, model)
    if settings.exact and drawing:
        progress("checking whether answers are exact")
        model = replace(model, exact=await _is_exact(engine, parameters, model, warn))
    caches_prefixes = engine.vllm_config.cache_config.enable_prefix_caching
    runner = VllmRunner(
        engine,
        thread,
        model,
        parameters=parameters,
        step_tokens=engine.vllm_config.scheduler_config.max_num_batched_tokens,
        shared_block_tokens=model.block_tokens if caches_prefixes else 0,
        structure=Structure(grammars),
    )
    return runner


async def _answer_once(engine: Any, parameters: Callable[[SequenceSpec[Any]], Any], model: ModelInfo) -> None:
    """Compute two tokens: the first steps are slow, and fail if kernels do. Raises LoadingError."""
    ids = [number % model.vocabulary_size for number in range(min(_FIRST_PROMPT, model.context_length - 2))]
    spec = SequenceSpec("first", ids, len(ids), SamplingParams(seed=0, max_tokens=2, ignore_eos=True))
    try:
        prompt = {"type": "token", "prompt_token_ids": ids}
        async for _ in engine.generate(prompt, parameters(spec), spec.key):
            pass
    except Exception as error:
        log.debug("vLLM does not answer", exc_info=True)
        raise LoadingError(f"vLLM cannot compute with {model.name}: {one_line(error)}") from error


async def _is_exact(
    engine: Any, parameters: Callable[[SequenceSpec[Any]], Any], model: ModelInfo, warn: Report
) -> bool:
    difference = await find_difference(
        engine, parameters, vocabulary=model.vocabulary_size, context_length=model.context_length
    )
    if difference:
        warn(f"answers are repeated at best effort only: {difference} differed from the same answer alone")
    return not difference


def parse(words: list[str], *, cache: Path) -> Any:
    """Read vLLM's arguments, and add those that the runner depends on. Raises LoadingError.

    cache   folder for parsed tokenizers
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from yaml import YAMLError

    from headrace.worker.vllm.drawing.processor import CACHE, NAME
    from headrace.worker.vllm.lifetime import EndWithParent

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> None:
            raise argparse.ArgumentError(None, message)

    try:
        parser = AsyncEngineArgs.add_cli_args(Parser(add_help=False))
        # vLLM would place a file's arguments first, where those of the worker's settings replace them.
        placed = with_file(words, parser.load_config_file)
        parsed = AsyncEngineArgs.from_cli_args(parser.parse_args(placed))
    except (argparse.ArgumentError, ValueError, OSError, YAMLError) as error:
        raise LoadingError(f"--engine-args: {one_line(error)}") from error
    if parsed.max_num_batched_tokens is None and parsed.enable_chunked_prefill is not False:
        parsed.max_num_batched_tokens = _step_tokens(parsed)
    parsed.served_model_name = None
    parsed.scheduling_policy = "priority"
    # The runner's own logger of statistics is enough; it reports how much each step computed.
    parsed.disable_log_stats = True
    parsed.enable_logging_iteration_details = True
    parsed.additional_config = {
        **(parsed.additional_config or {}),
        "headrace": EndWithParent("worker"),
        CACHE: str(cache),
    }
    # vLLM has no logits processors with speculative decoding, and its second runner has others.
    if not parsed.speculative_config and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        parsed.logits_processors = [*(parsed.logits_processors or ()), NAME]
    return parsed


def _step_tokens(parsed: Any) -> int | None:
    """Return how many tokens a step should compute; None for vLLM's default."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    processes: int = parsed.tensor_parallel_size * parsed.pipeline_parallel_size
    sequences: int = parsed.max_num_seqs or _CPU_SEQUENCES * processes
    return max(_CPU_STEP_TOKENS, sequences)


def _model(
    config: Any,
    settings: Settings,
    folder: Path,
    *,
    version: str,
    tokenizer_fingerprint: str,
    warn: Report,
) -> ModelInfo:
    """Describe the model that vLLM has loaded."""
    from vllm.platforms import current_platform

    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    engines, processes = parallel.data_parallel_size, parallel.world_size_across_dp
    device = str(current_platform.device_type)
    dtype = str(model.quantization or model.dtype).removeprefix("torch.")
    vocabulary = int(model.get_vocab_size())
    # vLLM's figure holds for each engine, and accounts for layers that keep less than the whole context.
    tokens = engines * (cache.kv_cache_size_tokens or 0) or cache.num_gpu_blocks * cache.block_size
    return ModelInfo(
        name=settings.model,
        revision=folder.name if folder.parent.name == "snapshots" else "",
        dtype=dtype,
        device=device if processes == 1 else f"{device} x{processes}",
        tokenizer_fingerprint=tokenizer_fingerprint,
        weights_fingerprint=weights_fingerprint(
            folder, "", dtype, f"vllm {version} {device} {parallel.tensor_parallel_size}"
        ),
        context_length=int(model.max_model_len),
        vocabulary_size=vocabulary,
        eos_ids=end_ids(model, warn),
        max_running=engines * config.scheduler_config.max_num_seqs,
        block_tokens=int(cache.block_size),
        kv_blocks=tokens // cache.block_size,
        exact=False,
        features=FEATURES,
    )
