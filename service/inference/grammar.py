"""Answers that must be JSON of a schema: before each token, which tokens may come. llguidance decides it.

https://github.com/guidance-ai/llguidance says what it reads of JSON Schema. A schema comes from a client: what the
library cannot read, or finds too large, is a RequestError before anything is generated.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from service.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA = 100_000  # characters
_STEP_FUEL = 50_000  # what one token's mask may cost; a quarter of llguidance's own limit, some 20 ms
# Models that lost their way write blanks for ever, which JSON allows between any two tokens of its own.
_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\r\t]{0,12}"}


class Grammars:
    """Makes matchers for one tokenizer, whose tables are built when the first one is asked for."""

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int], vocabulary_size: int) -> None:
        self._tokenizer, self._stop_ids, self._vocabulary_size = tokenizer, sorted(stop_ids), vocabulary_size
        self._building = threading.Lock()
        self._tables: LLTokenizer | None = None
        self._newest: tuple[str, LLMatcher] | None = None  # several answers to one request have one schema

    def matcher(self, json_schema: str) -> Matcher:
        """A matcher at the beginning of an answer. May take seconds. RequestError for a schema that cannot be followed."""
        if len(json_schema) > MAX_SCHEMA:
            raise RequestError(
                f"the JSON schema has {len(json_schema)} characters, at most {MAX_SCHEMA} are taken.", "response_format"
            )
        from llguidance import LLMatcher, LLParserLimits  # an engine that is never asked for a schema does without
        from llguidance.hf import from_tokenizer

        with self._building:
            if self._tables is None:
                ends = self._stop_ids or None
                self._tables = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary_size, eos_token=ends)
            newest = self._newest
        if newest is not None and newest[0] == json_schema:
            return Matcher(newest[1].deep_copy(), self._stop_ids, self._vocabulary_size)
        try:
            grammar = LLMatcher.grammar_from_json_schema(json_schema, defaults=_OPTIONS)
            inner = LLMatcher(self._tables, grammar, limits=LLParserLimits(step_lexer_fuel=_STEP_FUEL))
            problem = inner.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            raise RequestError(
                f"the JSON schema cannot be followed: {problem.strip()[:300]}. Simplify it.", "response_format"
            )
        with self._building:
            self._newest = json_schema, inner
        return Matcher(inner.deep_copy(), self._stop_ids, self._vocabulary_size)


class Matcher:
    """Where one answer is in its grammar."""

    def __init__(self, inner: LLMatcher, stop_ids: list[int], vocabulary_size: int) -> None:
        self._inner, self._stop_ids = inner, stop_ids
        self._size = vocabulary_size

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._inner.is_stopped())

    def allowed(self) -> torch.Tensor:
        """True for each token that may come next, [V], the model's stop tokens where the answer may end."""
        bits = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        if self._inner.is_error():  # the mask says "end here" then, in the middle of a text
            self._raise_problem()
        allowed_V = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._size]).bool()
        allowed_V[self._stop_ids] = bool(self._inner.is_accepting())  # a stop token may be an ordinary one, too
        return allowed_V

    def accept(self, token: int) -> None:
        """The answer goes on with this token, which was allowed."""
        if token in self._stop_ids:
            return
        if not self._inner.consume_token(token) or self._inner.is_error():
            self._raise_problem()

    def _raise_problem(self) -> NoReturn:
        problem = str(self._inner.get_error()).partition("\n")[0]
        raise RuntimeError(f"the answer cannot go on under its schema: {problem}")
