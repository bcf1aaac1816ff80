"""Load an engine from files: a model folder in the format of transformers, or one .gguf file.

Problems of the files, the device and the model are detected before the worker is ready, and end it with a
message of one line (`refusals`). `model_config` reads config.json, `model_files` checks the files, `network`
loads the weights with transformers, `gguf` unpacks .gguf files, `assembly` builds the engine (that of a GPU
with `gpu_assembly`), and `self_check` compares it with transformers. This module never accesses the internet.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from headrace.models import file_digest
from headrace.worker.engine.attention_kinds import AttentionKind, Layers, choose_kind
from headrace.worker.engine.cpu.kernels.compiling import compile_kernels
from headrace.worker.engine.cpu.stored_model import ModelStore, Remembered, StoredModel, state_of_files
from headrace.worker.engine.interface import ModelInfo
from headrace.worker.engine.load import gpu_assembly, kv_sizing, self_check
from headrace.worker.engine.load.assembly import (
    LoadedModel,
    ModelEngine,
    as_unsupported,
    ignore,
    limit_malloc_arenas,
    release_freed_memory,
)
from headrace.worker.engine.load.devices import Plan, choose_device, set_up
from headrace.worker.engine.load.free_memory import enough_for_steps
from headrace.worker.engine.load.identity import read_eos_ids, weights_fingerprint
from headrace.worker.engine.load.precision import Precision, choose_precision, decoder_precision
from headrace.worker.engine.load.refusals import (
    SEE_MODELS,
    UnsupportedModel,
    as_loading_error,
    one_line,
)
from headrace.worker.engine.load.vocabulary import VocabularyReader
from headrace.worker.engine.transformers_attention import observe_layers, register_attention

Report = Callable[[str], None]  # receives one sentence
ReadNetwork = Callable[[Path, torch.dtype, torch.device, Report], Any]  # see `read_network`


def load_engine(
    path: Path,
    *,
    name: str,
    cache: Path,
    tokenizer_fingerprint: str,
    device: str = "cpu",
    dtype: str = "auto",
    threads: int | None = None,
    context_length: int | None = None,
    max_running: int = 32,
    step_tokens: int = 512,
    exact: bool = False,
    allow_pickle: bool = False,
    kv_memory: float | None = None,
    gpu_memory_share: float = 1.0,
    progress: Report = ignore,
    warn: Report = ignore,
    read: ReadNetwork | None = None,
) -> ModelEngine:
    """Load a model, check it and warm it up.

    path                    a folder with config.json and safetensors, or a .gguf file
    name                    name of the model in the mesh
    cache                   a folder for files that are made once, such as unpacked gguf weights
    tokenizer_fingerprint   copied to `ModelInfo`
    device                  "cpu", "cuda" or "cuda:N"
    dtype                   one of `precision.NAMES`; see `choose_precision`
    threads                 threads of torch on the CPU; None for torch's default
    context_length          most tokens of prompt and answer; None: see `model_config.choose_context`
    max_running             most sequences that run at the same time
    step_tokens             most tokens of a step; KV memory leaves space for such a step
    exact                   on a GPU, compute batch-invariant results; on a CPU they are anyway
    allow_pickle            whether weights may be pickles, which can hold code
    kv_memory               GiB of KV memory; None for a share of the available memory, see `kv_sizing`
    gpu_memory_share        share of a GPU's memory that this process may use
    progress                receives a short sentence before each step that takes time
    warn                    receives a sentence about each problem that does not prevent serving
    read                    reads the network from the folder; by default `read_network`

    Raises LoadingError, or UnsupportedModel if this engine would not compute the model correctly. Each
    message is one line; the traceback of an unexpected error is logged at level DEBUG.
    """
    with as_loading_error(f"cannot load {path}", f"{SEE_MODELS}; --log-level DEBUG logs the traceback"):
        limit_malloc_arenas()
        target = choose_device(device)
        if target.gpu:
            set_up(target, cache, exact=exact, memory_share=gpu_memory_share)
        elif exact:
            warn("--exact has no effect on a CPU, where the fast kernels are batch-invariant anyway")
        if threads is not None:
            torch.set_num_threads(threads)
        vocabulary_reader = VocabularyReader(path, cache)
        # As the scheduler, which always has space for a decode of each sequence.
        step_tokens = max(step_tokens, max_running)
        digest = file_digest(path) if path.suffix == ".gguf" and path.is_file() else ""
        revision = digest or (path.name if path.parent.name == "snapshots" else "")
        store = None
        if read is None and not target.gpu and (digest or path.is_dir()):
            settings = f"{digest or state_of_files(path)} {context_length} {allow_pickle}"
            store = ModelStore(cache, f"{path.resolve()} {dtype}", settings)

        def start(folder: Path, precision: Precision, context: int, checked: int) -> _Start:
            return _Start(
                name=name,
                revision=revision,
                tokenizer_fingerprint=tokenizer_fingerprint,
                folder=folder,
                digest=digest,
                context=context,
                checked=checked,
                max_running=max_running,
                kv_memory=kv_memory,
                precision=precision,
                plan=Plan(target, step_tokens, exact, positions=max(context, checked)),
                vocabulary_reader=vocabulary_reader,
                progress=progress,
                warn=warn,
            )

        if store is not None and (stored := store.read()) is not None:
            try:
                precision = decoder_precision(stored.weights.element_type)
                return start(path, precision, stored.context, stored.checked).from_store(stored)
            except UnsupportedModel as error:
                warn(f"{name} is loaded again: {one_line(error)}")
                store.discard()
                del stored
        # Imports transformers, which takes seconds and much memory.
        from headrace.worker.engine.load.model_config import (
            architecture_of,
            choose_context,
            longest_context,
            read_config,
        )
        from headrace.worker.engine.load.network import read_network

        folder = path
        if digest:
            from headrace.worker.engine.load.gguf.weights import dequantised

            folder = dequantised(path, digest=digest, cache=cache, progress=progress)
        config = read_config(folder)
        context = choose_context(config, context_length)
        precision = choose_precision(dtype, architecture_of(config), config, gpu=target.gpu)
        # The self-check computes sequences of a fixed length, even if only shorter ones are served.
        checked = min(self_check.GPU_CONTEXT if target.gpu else self_check.CONTEXT, longest_context(config))
        return start(folder, precision, context, checked).from_files(
            read or functools.partial(read_network, allow_pickle=allow_pickle), store
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Start:
    """The start of an engine with settled parameters; see `load_engine`.

    checked   tokens of the longest sequence of the self-check
    """

    name: str
    revision: str
    tokenizer_fingerprint: str
    folder: Path
    digest: str
    context: int
    checked: int
    max_running: int
    kv_memory: float | None
    precision: Precision
    plan: Plan
    vocabulary_reader: VocabularyReader
    progress: Report
    warn: Report

    def from_store(self, stored: StoredModel) -> ModelEngine:
        """Start with weights that were laid out and checked by an earlier start.

        Raises UnsupportedModel if their results are not the same bits as then.
        """
        self.progress(f"reading the stored weights of {self.name} in {self.precision.name}")
        kind = self._choose_kind(stored.layers)
        loaded = LoadedModel(None, stored.layers, kind, self.precision, self.plan, decoder=stored.weights)
        model = self._describe(loaded, stored.weights.vocabulary_size, stored.eos_ids)
        cases = self_check.make_cases(model.vocabulary_size, self.checked)
        with self._enough_for_steps():
            self.progress("comparing with the results of the first start")
            engine = _checked_engine(loaded, model, self.checked)
            self_check.check_alone(engine, cases[0], Remembered(stored.logits), self.checked)
            for sentence in stored.warnings:
                self.warn(sentence)
            return self._warm_up(loaded, dataclasses.replace(model, exact=True), mapped=stored.mapped_bytes)

    def from_files(self, read: ReadNetwork, store: ModelStore | None) -> ModelEngine:
        """Start with the files of the model, and store what later starts need."""
        plan, target = self.plan, self.plan.target
        self.progress(f"loading {self.name} in {self.precision.name}")
        warnings: list[str] = []

        def warn(sentence: str) -> None:
            warnings.append(sentence)
            self.warn(sentence)

        register_attention()
        network = read(self.folder, self.precision.network_dtype, target.device, warn)
        with as_unsupported(network, gpu=target.gpu):
            layers = observe_layers(network)
        loaded = LoadedModel(network, layers, self._choose_kind(layers), self.precision, plan)
        vocabulary = int(network.get_output_embeddings().weight.shape[0])
        configs = (network.generation_config, network.config.get_text_config())
        eos_ids = read_eos_ids(self.folder, configs, vocabulary=vocabulary, warn=warn)
        model = self._describe(loaded, vocabulary, eos_ids)
        cases = self_check.make_cases(vocabulary, self.checked)
        with self._enough_for_steps():
            with as_unsupported(network, gpu=target.gpu):
                references = self_check.make_references(network, cases, model.dtype, now=target.gpu)
            loaded = loaded.prepared(self.progress)
            self.progress("comparing with transformers' own forward pass")
            with as_unsupported(network, gpu=target.gpu):
                invariant = _check_engine(loaded, model, cases, references, self.checked)
            if plan.exact and target.gpu and not invariant:
                self.warn(
                    f"{self.name} is not batch-invariant on this device, although --exact was requested: "
                    "answers are announced as best effort"
                )
            loaded = loaded.without_network()
            agreed = references[0].agreed
            if store is not None and invariant and agreed is not None and loaded.decoder is not None:
                checked = StoredModel(
                    weights=loaded.decoder,
                    context=self.context,
                    checked=self.checked,
                    layers=layers,
                    eos_ids=eos_ids,
                    warnings=tuple(warnings),
                    logits=agreed,
                )
                store.write(checked)
            del network, references
            return self._warm_up(loaded, dataclasses.replace(model, exact=invariant))

    def _choose_kind(self, layers: Layers) -> AttentionKind:
        """Choose the attention, and compile its kernels."""
        target = self.plan.target
        if not target.gpu:
            compile_kernels(self.progress)
        kind = choose_kind(layers, target.device, self.precision.memory_dtype, gpu=target.gpu)
        if kind.reason:
            self.progress(f"attention in plain torch, which is slow: {kind.reason}")
        return kind

    def _describe(self, loaded: LoadedModel, vocabulary: int, eos_ids: frozenset[int]) -> ModelInfo:
        """Describe the model, and begin to make its vocabulary."""
        self.vocabulary_reader.make(size=vocabulary, eos_ids=eos_ids)
        block_tokens = loaded.kind.block_tokens
        return ModelInfo(
            name=self.name,
            revision=self.revision,
            dtype=self.precision.name,
            device=str(self.plan.target.device),
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            weights_fingerprint=weights_fingerprint(
                self.folder, self.digest, self.precision.name, self.plan.target.kernels
            ),
            context_length=self.context,
            vocabulary_size=vocabulary,
            eos_ids=eos_ids,
            max_running=self.max_running,
            block_tokens=block_tokens,
            kv_blocks=self.max_running * -(-self.context // block_tokens),
            exact=False,
            features=loaded.features,
        )

    def _enough_for_steps(self) -> AbstractContextManager[None]:
        return enough_for_steps(
            self.plan.target.device, step_tokens=self.plan.step_tokens, max_running=self.max_running
        )

    def _warm_up(self, loaded: LoadedModel, model: ModelInfo, *, mapped: int = 0) -> ModelEngine:
        """Size KV memory, and build the engine that serves.

        mapped   bytes of the weights that are in a mapped file
        """
        release_freed_memory()
        self.progress("measuring the memory of a step")
        blocks = _size_kv_memory(loaded, model, requested=self.kv_memory, mapped=mapped)
        model = dataclasses.replace(model, kv_blocks=blocks)
        gib = blocks * loaded.kind.block_bytes(loaded.layers) / 2**30
        self.progress(f"KV memory for {model.kv_tokens} tokens, {gib:.1f} GiB")
        grammars = self.vocabulary_reader.grammars(self.warn)
        if grammars is not None:
            model = dataclasses.replace(model, features=(*model.features, "structured"))
        return loaded.build_engine(model, self.progress, grammars=grammars)


def _check_engine(
    loaded: LoadedModel,
    model: ModelInfo,
    cases: Sequence[self_check.Case],
    expected: Mapping[int, self_check.Expected],
    context: int,
) -> bool:
    """Raise UnsupportedModel if the results are wrong, and return whether the engine is batch-invariant.

    context   tokens of the longest sequence of the cases
    """
    plan = loaded.plan
    # The fast kernels of GPUs are not batch-invariant, so only the results are checked.
    invariant = plan.exact or not plan.target.gpu
    sizes, running = None, self_check.SEQUENCES
    if plan.target.gpu and invariant:
        sizes, running = gpu_assembly.checked_sizes(model, plan.step_tokens), gpu_assembly.checked_rows(model)
    exact = self_check.check_model(
        _checked_engine(loaded, model, context, running),
        cases,
        expected,
        context=context,
        sizes=sizes,
        concurrent=loaded.decoder is not None and not plan.target.gpu,
    )
    if plan.target.gpu:
        return exact and invariant
    device, dtype = plan.target.device, loaded.precision.memory_dtype
    return self_check.check_attention(loaded.kind, loaded.layers, device, dtype) and exact


def _checked_engine(
    loaded: LoadedModel, model: ModelInfo, context: int, running: int = self_check.SEQUENCES
) -> ModelEngine:
    """Build an engine for the self-check."""
    checked = dataclasses.replace(
        model,
        max_running=running,
        context_length=context,
        kv_blocks=self_check.blocks_needed(model.block_tokens, context),
    )
    most = max(loaded.plan.step_tokens, self_check.step_tokens(context))
    plan = dataclasses.replace(loaded.plan, step_tokens=most)
    return dataclasses.replace(loaded, plan=plan).build_engine(checked)


def _size_kv_memory(loaded: LoadedModel, model: ModelInfo, *, requested: float | None, mapped: int) -> int:
    """Run the largest possible steps, and return the number of blocks that fit into the remaining memory."""
    # The rows of these steps use only two blocks, see `kv_sizing.largest_step`.
    two_blocks = dataclasses.replace(model, kv_blocks=2, context_length=2 * model.block_tokens)
    steps = kv_sizing.largest_steps(
        step_tokens=loaded.plan.step_tokens,
        max_running=model.max_running,
        context_length=model.context_length,
        block_tokens=model.block_tokens,
        scored="prompt_logprobs" in model.features,
    )

    def run() -> None:
        # All layers of a decoder on a CPU use the same buffers, so one layer has the same peak.
        engine = loaded.with_one_layer().build_engine(two_blocks, graphs=False)
        for rows in steps:
            engine.step(rows)

    return kv_sizing.measure_blocks(
        loaded.plan.target,
        run,
        block_bytes=loaded.kind.block_bytes(loaded.layers),
        block_tokens=model.block_tokens,
        sequence_blocks=-(-model.context_length // model.block_tokens),
        max_running=model.max_running,
        mapped=mapped,
        requested=None if requested is None else int(requested * 2**30),
    )
