"""The batch-invariant decoder: a token's logits do not depend on the steps that computed them."""

from __future__ import annotations

import pytest
import torch

from tests.worker.engine.gpu.decoder_cases import VOCABULARY, Model, network_of, prompts
from tests.worker.engine.gpu.device import DTYPES, needs_cuda
from tests.worker.engine.gpu.model_steps import Part


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen3, groups of 3, heads of 24", torch.float32),
        *(
            pytest.param(name, dtype, marks=needs_cuda)
            for name in ("wide llama", "wide qwen3")
            for dtype in DTYPES[1:]
        ),
    ],
)
def test_exact_logits_are_bit_identical_alone_in_a_batch_and_resumed(name: str, dtype: torch.dtype) -> None:
    """After a failover, another worker resumes the sequence: the answer must not change."""
    # The wide ones cross borders of segments of keys, and of tiles of matrix products.
    wide = "wide" in name
    ids, *others = prompts(601, 90, 257, 5) if wide else prompts(13, 3, 4, 2)
    last, chunk, padding = len(ids) - 1, len(ids) // 2, 60 if wide else 0
    network = network_of(name, dtype)
    alone = Model(network, exact=True)(Part(0, ids, 0, last + 1))

    together, decoding = Model(network, exact=True), Model(network, exact=True)
    together(*(Part(slot, own, 0, len(own) - 1) for slot, own in enumerate(others)), Part(3, ids, 0, chunk))
    together(Part(3, ids, chunk, last), padding=padding + 3)
    rows = [Part(slot, own, len(own) - 1, len(own)) for slot, own in enumerate(others)]
    decoding(Part(2, ids, 0, last - 1))
    decoding(Part(2, ids, last - 1, last))

    assert torch.equal(together(*rows, Part(3, ids, last, last + 1), padding=padding)[-1], alone[0])
    assert torch.equal(decoding(Part(2, ids, last, last + 1), padding=1)[0], alone[0])


def test_a_sequence_with_nan_does_not_affect_others() -> None:
    network = network_of("llama")
    ids, poisoned = prompts(5, 5)
    ids = [index % (VOCABULARY - 1) for index in ids]
    expected = Model(network, exact=True)(Part(0, ids, 0, 5))
    with torch.no_grad():
        network.get_input_embeddings().weight[VOCABULARY - 1] = float("nan")
    poisoned[2] = VOCABULARY - 1

    seen = Model(network, exact=True)(Part(1, poisoned, 0, 5), Part(0, ids, 0, 5))

    assert seen[0].isnan().all()
    assert torch.equal(seen[1], expected[0])
