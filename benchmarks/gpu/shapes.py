"""The models that are measured: random weights of true shapes, and a tokenizer for them, all made in code.

Speed depends on shapes, not on what a model has learned. Weights are random rather than zero, because a
device multiplies zeros faster. The tokenizer is a byte-level BPE like those of Llama 3 and Qwen, over made-up
words, so that a prompt can be given as ids to an engine and as text to the mesh.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"
_SYLLABLES = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
_SPACE = "\u0120"  # how byte-level tokenizers write the space before a word
_END = "<|endoftext|>"
_BYTES = 256
FIRST_WORD = _BYTES + len(_SYLLABLES)  # id of the first token that is a whole word
_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@dataclass(frozen=True)
class Shape:
    """The shape of a model, and what a step of it reads and computes.

    name           as it is written on the command line
    architecture   the class of its configuration in transformers, without "Config"
    tied           whether the head shares the weights of the embedding
    """

    name: str
    architecture: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    rope_theta: float
    context: int = 4096

    @property
    def layer_weights(self) -> int:
        """Number of weights in the matrices of one layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """Number of weights that a decode step reads: all layers and the head."""
        return self.layers * self.layer_weights + self.vocabulary * self.hidden

    @property
    def kv_numbers(self) -> int:
        """Numbers in the keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def products(self) -> list[tuple[str, int, int]]:
        """The products of a layer with fused weights: name, outputs and inputs."""
        queries = self.heads * self.head_dim
        return [
            ("qkv", queries + 2 * self.kv_heads * self.head_dim, self.hidden),
            ("output", self.hidden, queries),
            ("gate_up", 2 * self.intermediate, self.hidden),
            ("down", self.hidden, self.intermediate),
        ]

    def config(self) -> Any:
        """Return the configuration for transformers."""
        import transformers

        made = getattr(transformers, f"{self.architecture}Config")
        return made(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            tie_word_embeddings=self.tied,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            initializer_range=0.02,
            bos_token_id=None,
            eos_token_id=self.vocabulary - 1,
            pad_token_id=None,
            architectures=[f"{self.architecture}ForCausalLM"],
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-0.6b", "Qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, True, 1e6),
        Shape("qwen2.5-0.5b", "Qwen2", 151_936, 896, 4864, 24, 14, 2, 64, True, 1e6),
        Shape("llama-3-8b", "Llama", 128_256, 4096, 14_336, 32, 32, 8, 128, False, 5e5),
        # Of the rehearsal. The contexts leave room for all that it does.
        Shape("tiny-qwen3", "Qwen3", 600, 32, 48, 1, 4, 2, 16, True, 1e4, 256),
        Shape("tiny-qwen2", "Qwen2", 600, 32, 48, 1, 2, 1, 16, True, 1e4, 256),
        Shape("tiny-llama", "Llama", 600, 32, 48, 2, 2, 1, 16, False, 1e4, 256),
    )
}
REAL = ("qwen3-0.6b", "llama-3-8b", "qwen2.5-0.5b")
TINY = ("tiny-qwen3",)  # one: the interpreter is slow, and other tests compute all architectures


def random_network(shape: Shape, device: str, dtype: str, attention: str) -> Any:
    """Make a network of transformers with random weights on a device, the same in every process.

    attention   name of an attention function of transformers
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    with torch.device(device):
        network = auto.from_config(
            shape.config(),
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=False,
        )
    return network.eval()


def model_folder(shape: Shape, folder: Path) -> Path:
    """Write a model folder: its configuration, its tokenizer, and a file without weights. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    shape.config().save_pretrained(folder)
    _tokenizer(shape.vocabulary).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END,
        "chat_template": _TEMPLATE,
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@functools.cache
def words(vocabulary: int) -> list[str]:
    """Return the word of each token from id FIRST_WORD to vocabulary - 2, without the space before it."""
    count = vocabulary - 1 - FIRST_WORD
    found: list[str] = []
    longest = [""]
    while len(found) < count:
        longest = [word + syllable for word in longest for syllable in _SYLLABLES][: count - len(found)]
        found += longest
    return found


def text_of(ids: Sequence[int], vocabulary: int) -> str:
    """Return the text whose tokens are *ids*, all of which are words."""
    known = words(vocabulary)
    return "".join(f" {known[index - FIRST_WORD]}" for index in ids)


def _tokenizer(vocabulary: int) -> Any:
    """Make a byte-level BPE of this many tokens: bytes, syllables, words, and the end of a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    known = words(vocabulary)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_SYLLABLES, *(_SPACE + word for word in known)]
    # A merge makes a token of two: letters to syllables, and syllables to longer and longer words.
    merges = [(syllable[0], syllable[1]) for syllable in _SYLLABLES]
    merges += [(_SPACE + word[:-2] if word[:-2] else _SPACE, word[-2:]) for word in known]
    made = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(_END, normalized=False, special=True)])
    return made
