"""Reserve a tokenizer's special tokens for the chat template: inside messages the same characters are text.

A template writes special tokens such as `<|im_end|>` between the messages. Inside a message these characters
must not end its turn or start another. So every character of a message at which a special token could start
is replaced by a mark before the template renders the messages. Special tokens that are left afterwards are
the template's own. If the tokenizer still finds others in the text, a second tokenizer encodes it: the same
one, except that its special tokens have secret names, which are substituted only for the template's own.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

# Marks and secret names are made of private-use characters, which have no meaning in any font or language.
_PRIVATE = "\U000f0000"
_LIKE_SPECIAL = re.compile(r"<\S+>|\[\S+\]")
_PRIVATE_LETTERS = re.compile("[\U000f0000-\U0010ffff]")


def encode(fast: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Return the ids of a text. Releases the GIL.

    add_special_tokens   with the special tokens that the model expects in front
    """
    # `encode` itself would hold the interpreter's lock until it returns: 10 s for some megabytes.
    return list(fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)


class Marks:
    """Placeholder characters that occur in none of the given texts.

    letters   the characters that they replace
    texts     the texts whose characters are replaced, and the template that these are inserted into
    """

    def __init__(self, letters: str, texts: Iterable[str]) -> None:
        taken = {letter for text in texts if not text.isascii() for letter in _PRIVATE_LETTERS.findall(text)}
        free = (mark for code in range(ord(_PRIVATE), 0x110000) if (mark := chr(code)) not in taken)
        self.of = dict(zip(letters, free, strict=False))
        self.end = next(free)

    def removed_from(self, text: str) -> str:
        """Return the text with its original characters instead of marks."""
        for letter, mark in self.of.items():
            text = text.replace(mark, letter)
        return text


class SpecialTokens:
    """The tokens that only a template may write. Safe to use from several threads.

    fast         the `tokenizers.Tokenizer` of the model
    description  its JSON form
    frame        the text that its template writes around messages: tokens in it that look like special ones,
                 such as `<start_of_turn>`, are reserved as well, although some files do not declare them
                 special
    """

    def __init__(self, fast: Any, description: dict[str, Any], frame: str) -> None:
        self._fast = fast
        added = [token for token in description["added_tokens"] if token["content"]]
        own = [
            token
            for token in added
            if (token["special"] or (_LIKE_SPECIAL.fullmatch(token["content"]) and token["content"] in frame))
            and _recognised(fast, token)
        ]
        self._ids = {token["content"]: token["id"] for token in own}
        self._words = {token["content"] for token in own if token["single_word"]}
        self._special = frozenset(self._ids.values())
        self._letters = "".join(sorted({name[0] for name in self._ids}))
        own_names = _trie(self._ids)
        others = _trie(token["content"] for token in added if token["content"] not in self._ids)
        letters = f"[{re.escape(self._letters)}]" if self._letters else "(?!)"
        self._names = re.compile(own_names)
        self._letters_at = re.compile(f"(?={own_names})(?P<own>{letters})|{others}|(?P<letter>{letters})")
        self._names_at = re.compile(f"(?={own_names})(?P<own>{letters})")
        self._secret = {name: f"{chr(0x10FFFD)}{secrets.token_hex(16)}." for name in self._ids}
        self._renamed = _renamed(description, self._secret)

    def may_occur_in(self, texts: Iterable[str]) -> bool:
        """Return whether a special token could start in one of *texts*."""
        return any(letter in text for text in texts for letter in self._letters)

    def marks(self, texts: Iterable[str]) -> Marks:
        """Return marks for *texts*."""
        return Marks(self._letters, texts)

    def mark(self, text: str, marks: Marks, *, names_only: bool = False) -> str:
        """Put marks where a special token could start.

        names_only   only where the whole name of one is in *text*

        Other named tokens, such as `</think>`, are left unchanged, because templates search for them.
        """

        def marked(match: re.Match[str]) -> str:
            return marks.of[match[0]] if match.lastgroup else match[0]

        return (self._names_at if names_only else self._letters_at).sub(marked, text)

    def encode(self, text: str, marks: Marks) -> list[int]:
        """Return the ids of a chat, with a special token for each name in *text* without a mark."""
        wanted: list[int] = []

        def secret(match: re.Match[str]) -> str:
            name = match[0]
            if name in self._words and _within_a_word(match):
                return name
            wanted.append(self._ids[name])
            return self._secret[name]

        renamed = self._names.sub(secret, text)
        ids = encode(self._fast, marks.removed_from(text))
        if [id for id in ids if id in self._special] == wanted:
            return ids
        return encode(self._renamed, marks.removed_from(renamed))


def _within_a_word(match: re.Match[str]) -> bool:
    text, start, end = match.string, match.start(), match.end()
    return bool(re.search(r"\w", text[max(start - 1, 0) : start] + text[end : end + 1]))


def _recognised(fast: Any, token: dict[str, Any]) -> bool:
    """Return whether the tokenizer finds the token inside a text, which depends on how it writes spaces."""
    return token["id"] in encode(fast, f".{token['content']}.")


def _trie(names: Iterable[str]) -> str:
    """Return a regular expression for the longest of *names* at a position, fast even for thousands."""
    root: dict[str, Any] = {}
    for name in names:
        node = root
        for letter in name:
            node = node.setdefault(letter, {})
        node[""] = {}

    def expression(node: dict[str, Any]) -> str:
        branches = [re.escape(letter) + expression(rest) for letter, rest in node.items() if letter]
        if not branches:
            return ""
        joined = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
        return f"(?:{joined})?" if "" in node else joined

    return expression(root) or "(?!)"


def _renamed(description: dict[str, Any], names: dict[str, str]) -> Any:
    """Return the tokenizer of a description, with other names for some of its tokens and the same ids."""
    from tokenizers import Tokenizer

    added = [
        {**token, "content": names.get(token["content"], token["content"])}
        for token in description["added_tokens"]
    ]
    model = dict(description["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): id for token, id in vocabulary.items()}
    else:  # a unigram model: pairs of a token and its score
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [
            [a, b] for a, b in model["merges"] if a not in names and b not in names and a + b not in names
        ]
    return Tokenizer.from_str(json.dumps({**description, "added_tokens": added, "model": model}))
