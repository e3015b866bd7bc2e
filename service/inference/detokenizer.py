"""From token ids to text that may be sent, token by token: never half a character, never a piece of a stop string.

A byte-level token can hold part of a UTF-8 character, which decodes to U+FFFD until the rest has come; a stop string can
span tokens. What could still change, or still become a stop string, is held back. Pure: knows tokenizers, not models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Decoders that strip a leading space or join pieces need to see what came before: a few ids of the prompt.
_CONTEXT_IDS = 5
_LONGEST_CHARACTER = 8  # ids that a character may take; after more that are none, they are what they are
_REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one answer. `push` each token id; `stopped` says that a stop string was met; `finish` gives the rest."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False
        context = list(prompt_ids[-_CONTEXT_IDS:])
        if self._decode(context).endswith(_REPLACEMENT):
            context = []  # the prompt itself ends within a character
        self._ids, self._settled = (
            context,
            len(context),
        )  # ids since the last settled text; how many of them are settled

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token, which may be none."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._settled < _LONGEST_CHARACTER:
            return ""
        return self._release(self._settle(text))

    def finish(self) -> str:
        """Everything held back, once no token follows. A character that was never completed stays U+FFFD."""
        tail = self._release(self._settle(self._decode(self._ids)))
        if self.stopped:
            return tail
        held, self._held = self._held, ""
        return tail + held

    def _settle(self, text: str) -> str:
        """`text` of all ids at hand, less what was settled before; the newest ids stay as context for the next."""
        new = text[len(self._decode(self._ids[: self._settled])) :]
        self._ids = self._ids[self._settled :] or self._ids
        self._settled = len(self._ids)
        return new

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`.

    >>> _overlap("so th", "the end")
    2
    """
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
