"""An OpenAI server that pretends to be a vLLM with the plugin:  python fake_replica.py PORT --gpu L40S

It answers completions and chats after --delay seconds, streamed or not, and its /metrics show what the plugin would
with the setting `routing`. POST /fake {"mode": ...} changes how it behaves: "ok", "hung" (answers nothing any more),
"mute" (no metrics), "failing" (500 on completions), "stale" (its snapshots keep their time). GET /fake says what it has
served.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

OUTPUT_TOKENS = 16


class Replica:
    """One server's state."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.mode, self.held, self.served, self.prompt_tokens = args, "ok", 0, 0, 0
        self.held_at_least = 0  #: as if others had sent requests too
        self.stopped_s: float | None = None
        self.bodies: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}

    def metrics(self) -> str:
        """The page."""
        args, held = self.args, max(self.held, self.held_at_least)
        common = f'model_name="{args.served_model_name}",engine="0"'
        now = self.stopped_s if self.stopped_s is not None else time.time()
        profile = f'gpu="{args.gpu}",source="setting",dtype="bfloat16",quantization="None"'
        profile += ',tensor_parallel_size="1",pipeline_parallel_size="1"'
        info = 'data_parallel_size="1",prefill_context_parallel_size="1",decode_context_parallel_size="1"'
        info += ',enable_expert_parallel="false",kv_cache_dtype="auto",max_num_seqs="256"'
        info += ',max_num_batched_tokens="8192",enforce_eager="false",vllm_release="0.32.0"'
        values = {
            f"energylens_held_requests{{{common}}}": held,
            f"energylens_waiting_tokens{{{common}}}": 0,
            f"energylens_kv_used_tokens{{{common}}}": 600 * held,
            f"energylens_kv_capacity_tokens{{{common}}}": 400_000,
            f"energylens_snapshot_timestamp_seconds{{{common}}}": now,
            f'energylens_tokens_total{{{common},phase="prefill"}}': self.prompt_tokens,
            f'energylens_tokens_total{{{common},phase="decode"}}': OUTPUT_TOKENS * self.served,
            f"energylens_predicted_step_time_seconds_total{{{common}}}": 0.01 * self.served,
            f"energylens_measured_step_time_seconds_total{{{common}}}": 0.01 * self.served,
            f"energylens_profile_info{{{common},{profile}}}": 1,
            f"energylens_replica_info{{{common},{info}}}": 1,
            f"vllm:request_prompt_tokens_sum{{{common}}}": self.prompt_tokens,
            f"vllm:request_prompt_tokens_count{{{common}}}": self.served,
            f"vllm:request_generation_tokens_sum{{{common}}}": OUTPUT_TOKENS * self.served,
            f"vllm:request_generation_tokens_count{{{common}}}": self.served,
        }
        return "".join(f"{name} {value}\n" for name, value in values.items())


async def answer(replica: Replica, method: str, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
    """One request."""
    if path == "/fake" and method == "GET":
        told = {"served": replica.served, "held": replica.held, "headers": replica.headers}
        reply(writer, 200, json.dumps(told).encode())
    elif path == "/fake":
        asked = json.loads(body)
        replica.mode = asked.get("mode", replica.mode)
        replica.held_at_least = asked.get("held", replica.held_at_least)
        replica.stopped_s = time.time() if replica.mode == "stale" else None
        reply(writer, 200, b"{}")
    elif replica.mode == "hung":
        await asyncio.sleep(3600)
    elif path == "/metrics":
        page = "" if replica.mode == "mute" else replica.metrics()
        reply(writer, 200, page.encode(), "text/plain; version=0.0.4")
    elif path == "/health":
        reply(writer, 200, b"{}")
    elif path.endswith("/models"):
        listed = {"object": "list", "data": [{"id": replica.args.served_model_name, "object": "model"}]}
        reply(writer, 200, json.dumps(listed).encode())
    elif replica.mode == "failing":
        reply(writer, 500, b'{"error": {"message": "out of order"}}')
    else:
        await complete(replica, path, json.loads(body), writer)


async def complete(replica: Replica, path: str, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """A completion or a chat."""
    replica.held += 1
    try:
        if replica.args.delay:
            await asyncio.sleep(replica.args.delay)
        chat = path.endswith("/chat/completions")
        tokens = len(json.dumps(asked.get("messages") or asked.get("prompt"))) // 4
        common = {"id": f"fake-{replica.served}", "created": 1, "model": asked.get("model", "fake")}
        usage = {"prompt_tokens": tokens, "completion_tokens": OUTPUT_TOKENS, "total_tokens": tokens + OUTPUT_TOKENS}
        text = f"from {replica.args.port}"
        replica.served += 1
        replica.prompt_tokens += tokens
        if asked.get("stream"):
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
                b"x-replica: %d\r\n\r\n" % replica.args.port
            )
            kind = "chat.completion.chunk" if chat else "text_completion"
            for i in range(2):
                choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if i else None}
                choice |= {"delta": {"role": "assistant", "content": text}} if chat else {"text": text}
                event = {**common, "object": kind, "choices": [choice]} | ({"usage": usage} if i else {})
                chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")
            chunk(writer, b"data: [DONE]\n\n")
            chunk(writer, b"")
        else:
            choice = {"index": 0, "finish_reason": "stop"}
            choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            kind = "chat.completion" if chat else "text_completion"
            whole = {**common, "object": kind, "choices": [choice], "usage": usage}
            reply(writer, 200, json.dumps(whole).encode(), extra=f"x-replica: {replica.args.port}\r\n")
    finally:
        replica.held -= 1


def chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Of a chunked body; an empty one ends it."""
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def reply(
    writer: asyncio.StreamWriter, status: int, body: bytes, kind: str = "application/json", extra: str = ""
) -> None:
    """A whole response."""
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    writer.write(head.encode() + body)


async def serve(args: argparse.Namespace) -> None:
    """Until the process ends."""
    replica = Replica(args)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {
                    name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if path.startswith("/v1"):
                    replica.headers = headers
                await answer(replica, method, path, body, writer)
                await writer.drain()
                if headers.get("connection", "").lower() == "close":
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", args.port)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--gpu", default="H200-SXM")
    parser.add_argument("--served-model-name", default="llama-3.1-8b")
    parser.add_argument("--delay", type=float, default=0.0)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
