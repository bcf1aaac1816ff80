"""Run OpenVINO GenAI's ContinuousBatchingPipeline step by step, without prefix caching."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import Any

from benchmarks.serving.hosts.pipe import Pipe


def main() -> None:
    """Load the model, then run steps while there are requests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a folder that optimum-cli exported")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    pipe = Pipe()

    import numpy
    import openvino
    import openvino_genai as genai

    scheduling = genai.SchedulerConfig()
    scheduling.cache_size = 2  # GB
    scheduling.max_num_batched_tokens = 512
    scheduling.max_num_seqs = 64
    scheduling.dynamic_split_fuse = True
    scheduling.enable_prefix_caching = False
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": arguments.threads}
    pipeline = genai.ContinuousBatchingPipeline(arguments.model, scheduling, "CPU", properties)
    handles: dict[int, Any] = {}
    pipe.ready({name: version(name) for name in ("openvino", "openvino-genai")})
    while (asks := pipe.take(wait=not handles)) is not None:
        for ask in asks:
            wanted = genai.GenerationConfig()
            wanted.max_new_tokens = ask.tokens
            wanted.ignore_eos = True
            wanted.do_sample = False
            prompt = openvino.Tensor(numpy.array([ask.prompt], dtype=numpy.int64))
            handles[ask.key] = pipeline.add_request(ask.key, prompt, wanted)
        pipeline.step()
        updates = []
        for key, handle in list(handles.items()):
            while handle.can_read():
                updates += [(key, list(output.generated_ids)) for output in handle.read().values()]
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                del handles[key]
        pipe.tokens(updates)


if __name__ == "__main__":
    main()
