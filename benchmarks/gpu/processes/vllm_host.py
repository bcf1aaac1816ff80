"""Run vLLM on the ids of a file: `python -m benchmarks.gpu.processes.vllm_host FOLDER FILE DTYPE`.

Its weights are random like ours. Prints the number of output tokens and the time as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Load the model, answer the requests once to warm up and once to measure."""
    import vllm

    folder, file, dtype = sys.argv[1:]
    requests = json.loads(Path(file).read_text())
    engine = vllm.LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=2304,
        max_num_seqs=256,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids, _ in requests]

    def params(most: int) -> list[object]:
        return [
            vllm.SamplingParams(
                temperature=0.6, ignore_eos=True, max_tokens=min(tokens, most), detokenize=False
            )
            for _, tokens in requests
        ]

    engine.generate(prompts[:4], params(8)[:4], use_tqdm=False)
    began = time.perf_counter()
    outputs = engine.generate(prompts, params(1 << 20), use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "version": vllm.__version__}))


if __name__ == "__main__":
    main()
