"""The calls of the TokenizerService."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from headrace.v1 import tokenizer_service_pb2 as pb

_EMPTY: Mapping[str, Any] = {}


class TokenizerCalls(ABC):
    """The calls of the TokenizerService, as a part of `Client`; timeout and metadata as of `generate`."""

    async def tokenize(
        self, request: pb.TokenizeRequest, *, timeout: float = 5.0, metadata: Mapping[str, str] = _EMPTY
    ) -> pb.TokenizeResponse:
        """Return the token ids of a text or a conversation."""
        response: pb.TokenizeResponse = await self._call_tokenizer("Tokenize", request, timeout, metadata)
        return response

    async def detokenize(
        self, request: pb.DetokenizeRequest, *, timeout: float = 5.0, metadata: Mapping[str, str] = _EMPTY
    ) -> pb.DetokenizeResponse:
        """Return the text of token ids."""
        response: pb.DetokenizeResponse = await self._call_tokenizer("Detokenize", request, timeout, metadata)
        return response

    async def count_tokens(
        self, request: pb.CountTokensRequest, *, timeout: float = 5.0, metadata: Mapping[str, str] = _EMPTY
    ) -> pb.CountTokensResponse:
        """Return how many tokens a text or a conversation has."""
        response: pb.CountTokensResponse = await self._call_tokenizer(
            "CountTokens", request, timeout, metadata
        )
        return response

    async def get_tokenizer(
        self, request: pb.GetTokenizerRequest, *, timeout: float = 5.0, metadata: Mapping[str, str] = _EMPTY
    ) -> pb.GetTokenizerResponse:
        """Return the special tokens and the chat template."""
        response: pb.GetTokenizerResponse = await self._call_tokenizer(
            "GetTokenizer", request, timeout, metadata
        )
        return response

    @abstractmethod
    async def _call_tokenizer(
        self, method: str, request: Any, timeout: float, metadata: Mapping[str, str]
    ) -> Any:
        """Make a call of the service's *method*."""
