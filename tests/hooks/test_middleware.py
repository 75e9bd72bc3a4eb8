"""The middleware alone, around applications that answer in every way."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from energylens_vllm.hooks.vllm.middleware import EnergyMiddleware

ENERGY = {"joules": 12.5, "prefill_joules": 10.0, "decode_joules": 2.5}


def through(messages: list[dict[str, Any]], scope: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """What a client gets of an application that sends `messages`."""
    received: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    async def send(message: dict[str, Any]) -> None:
        received.append(message)

    asyncio.run(EnergyMiddleware(app)(scope or {"type": "http", "method": "POST"}, None, send))
    return received


def response(*bodies: bytes, kind: str = "application/json") -> list[dict[str, Any]]:
    length = str(sum(map(len, bodies))).encode()
    headers = [(b"content-length", length), (b"content-type", kind.encode()), (b"x-request-id", b"7")]
    return [
        {"type": "http.response.start", "status": 200, "headers": headers},
        *(
            {"type": "http.response.body", "body": body, "more_body": i < len(bodies) - 1}
            for i, body in enumerate(bodies)
        ),
    ]


def answer(**fields: Any) -> dict[str, Any]:
    return {"id": "cmpl-1", "choices": [{"text": "héllo"}], "usage": {"total_tokens": 9}, **fields}


@pytest.mark.parametrize("cut", [0, 40])
def test_energy_is_lifted(cut: int) -> None:
    body = json.dumps(answer(kv_transfer_params={"energylens": ENERGY})).encode()
    start, *rest = through(response(*([body[:cut], body[cut:]] if cut else [body])))
    (lifted,) = rest
    assert json.loads(lifted["body"]) == answer(usage={"total_tokens": 9, "energy": ENERGY}, kv_transfer_params=None)
    headers = dict(start["headers"])
    assert headers[b"x-energylens-joules"] == b"12.5"
    assert headers[b"content-length"] == str(len(lifted["body"])).encode()
    assert headers[b"x-request-id"] == b"7"


def test_what_others_put_there_stays() -> None:
    body = json.dumps(answer(kv_transfer_params={"energylens": ENERGY, "remote_host": "a"}, usage=None)).encode()
    _, lifted = through(response(body))
    found = json.loads(lifted["body"])
    assert (found["kv_transfer_params"], found["usage"]) == ({"remote_host": "a"}, {"energy": ENERGY})


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(answer(kv_transfer_params=None)).encode(),
        json.dumps(answer(note='says "energylens"')).encode(),
        json.dumps(["energylens"]).encode(),
        json.dumps(answer(kv_transfer_params={"energylens": {"joules": "many"}})).encode(),
        b'not JSON "energylens"',
        b"",
    ],
)
def test_anything_else_is_passed_on_byte_for_byte(body: bytes) -> None:
    assert [(m.get("body"), m.get("headers")) for m in through(response(body))] == [
        (m.get("body"), m.get("headers")) for m in response(body)
    ]


def test_a_stream_is_lifted_as_it_comes() -> None:
    def event(**fields: Any) -> bytes:
        return b"data: " + json.dumps(answer(**fields)).encode() + b"\n\n"

    messages = response(
        event(), event(kv_transfer_params={"energylens": ENERGY}), b"data: [DONE]\n\n", kind="text/event-stream"
    )
    received = through(messages)
    assert [len(received), received[0], received[1], received[3]] == [4, messages[0], messages[1], messages[3]]
    line, *rest = received[2]["body"].split(b"\n")
    assert rest == [b"", b""]
    assert json.loads(line.removeprefix(b"data: "))["usage"]["energy"] == ENERGY


@pytest.mark.parametrize("scope", [{"type": "http", "method": "GET"}, {"type": "websocket"}, {"type": "lifespan"}])
def test_other_traffic_is_not_looked_at(scope: dict[str, Any]) -> None:
    body = json.dumps(answer(kv_transfer_params={"energylens": ENERGY})).encode()
    assert through(response(body), scope) == response(body)
