"""What routing reads of a request's body: lengths and hashes. No text is kept, so none can reach a log.

Text is cut into blocks of `BLOCK_CHARS` characters, prompts given as tokens into blocks of `BLOCK_TOKENS`. The hash of
a block covers all blocks before it, as vLLM's prefix cache has it. It is Python's own, keyed anew in each process: it
tells prompts apart and does not give them away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLOCK_CHARS, BLOCK_TOKENS = 256, 64
#: Blocks of a prompt that are hashed, from its start: 64k tokens of the longest.
MOST_BLOCKS = 1024
#: Characters of a token until replicas have told: English text in the vocabularies of today's models.
CHARS_PER_TOKEN = 4.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's length, the hashes of its blocks, and where its answer would be cut."""

    chars: int
    tokens: int  #: of the parts that came as tokens
    blocks: tuple[int, ...]
    max_tokens: int | None

    def length(self, chars_per_token: float) -> float:
        """In tokens: known for what came as tokens, estimated for text."""
        return self.tokens + self.chars / chars_per_token

    def block_length(self, chars_per_token: float) -> float:
        """Tokens of a block."""
        return BLOCK_TOKENS if self.tokens else BLOCK_CHARS / chars_per_token


def read(body: object) -> Prompt | None:
    """The prompt of an OpenAI request (chat or completion), as a mapping or an object; None if it has none."""
    messages, prompt = _field(body, "messages"), _field(body, "prompt")
    tokens: list[int] = []
    if isinstance(messages, Sequence) and not isinstance(messages, str | bytes):
        text = "".join(_chat(messages))
    elif isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        text, tokens = "".join(part for part in prompt if isinstance(part, str)), list(_tokens(prompt))
    else:
        return None
    most = _field(body, "max_completion_tokens") or _field(body, "max_tokens")
    return Prompt(
        len(text),
        len(tokens),
        tuple(hashes(text, BLOCK_CHARS) if text else hashes(tokens, BLOCK_TOKENS)),
        most if isinstance(most, int) and most > 0 else None,
    )


def _field(body: object, name: str) -> Any:
    return body.get(name) if isinstance(body, Mapping) else getattr(body, name, None)


def _chat(messages: Sequence[object]) -> Iterator[str]:
    """The text of a conversation; what is not text (images, audio) counts as nothing."""
    for message in messages:
        yield f"{_field(message, 'role')}\n"
        content = _field(message, "content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, Sequence):
            for part in content:
                text = _field(part, "text")
                if isinstance(text, str):
                    yield text
        yield "\n"


def _tokens(prompt: Sequence[object]) -> Iterator[int]:
    """Of one prompt in tokens, or of several."""
    for part in prompt:
        if isinstance(part, int):
            yield part
        elif isinstance(part, Sequence) and not isinstance(part, str | bytes):
            yield from _tokens(part)


def hashes(content: str | Sequence[int], size: int) -> Iterator[int]:
    """Of each whole block of `size`, all before it included."""
    before = 0
    for start in range(0, min(len(content) // size, MOST_BLOCKS) * size, size):
        block = content[start : start + size]
        before = hash((before, block if isinstance(block, str) else tuple(block)))
        yield before
