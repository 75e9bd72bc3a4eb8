"""What is read of requests, and which prefixes are remembered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from energylens_vllm.routing.prefixes import Prefixes
from energylens_vllm.routing.prompts import MOST_BLOCKS, Prompt, read


def parsed(body: Any) -> Prompt:
    prompt = read(body)
    assert prompt is not None
    return prompt


def test_text() -> None:
    prompt = parsed({"prompt": "x" * 1000, "max_tokens": 7})
    assert (prompt.chars, prompt.tokens, len(prompt.blocks), prompt.max_tokens) == (1000, 0, 3, 7)
    assert prompt.length(4.0) == 250
    assert prompt.block_length(4.0) == 64


def test_tokens() -> None:
    prompt = parsed({"prompt": list(range(1000))})
    assert (prompt.chars, prompt.tokens, len(prompt.blocks), prompt.max_tokens) == (0, 1000, 15, None)
    assert prompt.length(4.0) == 1000
    assert prompt.block_length(4.0) == 64
    assert parsed({"prompt": [[1, 2], [3]]}).tokens == 3
    assert parsed({"prompt": ["one", "two"]}).chars == 6


def test_chat_as_mapping_and_as_object() -> None:
    messages = [
        {"role": "system", "content": "Be brief. " * 100},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image_url", "image_url": {}}]},
    ]
    as_objects = SimpleNamespace(
        messages=[SimpleNamespace(**message) for message in messages], prompt=None, max_completion_tokens=9
    )
    one, other = parsed({"messages": messages, "max_tokens": 9}), parsed(as_objects)
    assert one == other
    assert one.chars == len("system\n" + "Be brief. " * 100 + "\nuser\nWhy?\n")


@pytest.mark.parametrize("body", [None, 5, {}, {"input": "x"}, {"prompt": None}, SimpleNamespace()])
def test_no_prompt(body: object) -> None:
    assert read(body) is None


def test_a_block_stands_for_all_before_it() -> None:
    one, other = parsed({"prompt": "a" * 600}), parsed({"prompt": "b" + "a" * 599})
    assert not set(one.blocks) & set(other.blocks)
    longer = parsed({"prompt": "a" * 900})
    assert longer.blocks[:2] == one.blocks
    assert len(parsed({"prompt": "a" * 10_000_000}).blocks) == MOST_BLOCKS


def test_no_text_is_kept() -> None:
    assert "secret" not in repr(parsed({"prompt": "a secret " * 100}))


def test_prefixes() -> None:
    seen = Prefixes()
    assert seen.matched("a", (1, 2, 3)) == 0
    seen.add("a", (1, 2, 3))
    assert seen.matched("a", (1, 2, 3, 4)) == 3
    assert seen.matched("a", (1, 9, 3)) == 1
    assert seen.matched("a", (9, 1)) == 0
    assert seen.matched("b", (1,)) == 0
    seen.forget("a")
    assert seen.matched("a", (1,)) == 0


def test_the_ends_of_the_oldest_prompts_go_first() -> None:
    seen = Prefixes()
    seen.add("a", (1, 2, 3), most=5)
    seen.add("a", (1, 4, 5), most=5)
    assert (seen.matched("a", (1, 2, 3)), seen.matched("a", (1, 4, 5))) == (3, 3)
    seen.add("a", (6,), most=5)
    assert (seen.matched("a", (1, 2, 3)), seen.matched("a", (1, 4, 5)), seen.matched("a", (6,))) == (2, 3, 1)
    assert len(seen) == 5
    seen.add("a", (7,), most=0)
    assert len(seen) == 0
