"""`vllm serve MODEL --middleware energylens_vllm.hooks.vllm.middleware.EnergyMiddleware`: a request that asked for its
energy finds it where clients look, in `usage.energy` and, unless the response is streamed, in a header.

The engine hands it over in `kv_transfer_params`, the one field of its outputs that reaches a response as it is.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from energylens_vllm.serving.response import KEY

HEADER = b"x-energylens-joules"
_MARK = f'"{KEY}"'.encode()

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class EnergyMiddleware:
    """An ASGI application around another. What it does not understand it passes on as it is."""

    def __init__(self, app: Callable[[Any, Any, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        is_request = scope["type"] == "http" and scope["method"] == "POST"
        await self.app(scope, receive, _Lift(send) if is_request else send)


class _Lift:
    """Changes the messages of one response."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None  # held back while the body may still give a header
        self._body: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            if kind.startswith(b"application/json"):
                self._start = message
            else:
                await self._send(message)
        elif message["type"] == "http.response.body" and self._start is not None:
            self._body.append(message.get("body", b""))
            if not message.get("more_body"):
                await self._finish(self._start, b"".join(self._body))
        elif message["type"] == "http.response.body" and _MARK in message.get("body", b""):
            await self._send({**message, "body": b"\n".join(map(_lift_event, message["body"].split(b"\n")))})
        else:
            await self._send(message)

    async def _finish(self, start: Message, body: bytes) -> None:
        self._start = None
        if _MARK in body:
            lifted, joules = lift(body)
            if joules is not None:
                headers = [(k, v) for k, v in start["headers"] if k != b"content-length"]
                headers += [(b"content-length", b"%d" % len(lifted)), (HEADER, b"%.6g" % joules)]
                start, body = {**start, "headers": headers}, lifted
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})


def _lift_event(line: bytes) -> bytes:
    if _MARK not in line or not line.startswith(b"data: "):
        return line
    return b"data: " + lift(line.removeprefix(b"data: "))[0]


def lift(body: bytes) -> tuple[bytes, float | None]:
    """JSON with the energy moved from `kv_transfer_params` to `usage`, and the joules; as it was, None, if it has no
    energy there."""
    try:
        response = json.loads(body)
        energy = response["kv_transfer_params"].pop(KEY)
        joules = float(energy["joules"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return body, None
    response["kv_transfer_params"] = response["kv_transfer_params"] or None
    response["usage"] = {**(response.get("usage") or {}), "energy": energy}
    return json.dumps(response, ensure_ascii=False, separators=(",", ":")).encode(), joules
