"""An agent for HAProxy's agent-check: it says each replica's weight, in percent of what HAProxy's configuration gives.

HAProxy connects, sends the replica's name and a line feed (`agent-send "NAME\\n"`), and gets "42%". The replica that
should have most of the next requests has 100 %, the others in proportion, none less than `floor_percent`: a server of
weight 0 would get nothing even when all others have gone. With nothing known, all have 100 %, which is HAProxy's own
balancing. HAProxy keeps the last weights of an agent that has gone; so one that is asked to stop says 100 % for a
while first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping

from energylens_vllm.routing.decisions import cause_of
from energylens_vllm.routing.fleet import Targets
from energylens_vllm.routing.gateway import Gateway
from energylens_vllm.routing.policy import Config, Request
from energylens_vllm.routing.prompts import Prompt
from energylens_vllm.routing.scrape import Source
from energylens_vllm.routing.weights import shares

logger = logging.getLogger("energylens_vllm")

WEIGHED_S = 0.5  #: weights are as old as that at most
AHEAD_S = 2.0  #: weights are for the requests of so long: HAProxy asks each second or two
ASK_S = 2.0  #: how long an HAProxy that connects may take to say for whom
MOST_NAME = 256
#: A request before any has ended.
TYPICAL_PROMPT, TYPICAL_OUTPUT = 512.0, 256.0


class Agent:
    """Weighs replicas by name."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        targets: Targets | None = None,
        floor_percent: int = 1,
        gateway: Gateway | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gateway = gateway or Gateway(targets)
        self._names = tuple(sources)
        self.leaving = False  #: it is going to stop
        self._floor, self._clock = floor_percent, clock
        self._weights: dict[str, int] = {}
        self._weighed_s = float("-inf")
        self._strangers: set[str] = set()
        for name, source in sources.items():
            self.gateway.add(name, source)

    def weight(self, name: str) -> int | None:
        """Percent of the replica; None for one that is not known."""
        if name not in self._names:
            return None
        if self.leaving:
            return 100
        now = self._clock()
        if now - self._weighed_s > WEIGHED_S:
            self._weighed_s = now
            try:
                self._weights = self._weigh()
            except Exception as error:  # HAProxy balances as if there were no agent
                logger.warning("weighing replicas failed: %s", type(error).__name__)
                self.gateway.decisions.fell_back("error")
                self._weights = {}
        return self._weights.get(name, 100)

    def _weigh(self) -> dict[str, int]:
        fleet, histories = self.gateway.fleet, self.gateway.scraper.histories()
        prompts = [each.mean_prompt for each in histories if each.mean_prompt is not None]
        outputs = [each.mean_output for each in histories if each.mean_output is not None]
        prompt = sum(prompts) / len(prompts) if prompts else TYPICAL_PROMPT
        output = sum(outputs) / len(outputs) if outputs else TYPICAL_OUTPUT
        choice = fleet.rank(Prompt(0, round(prompt), (), None))
        request = Request(
            round(prompt), max(output, 1.0), ttft_s=fleet.targets.ttft_s, tpot_s=fleet.targets.tpot_s
        )  # fmt: skip
        coming = AHEAD_S * sum(each.arrivals_per_s for each in histories)
        parts = shares(choice.ranking.snapshots, request, coming, Config(max_age_s=fleet.targets.max_age_s), AHEAD_S)
        if parts is None:
            self.gateway.decisions.fell_back(cause_of(choice.ranking))
            return {}
        most = max(parts)
        return {
            key: max(round(100 * part / most), self._floor) for key, part in zip(choice.keys, parts, strict=True)
        }  # fmt: skip

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One question of HAProxy."""
        try:
            line = await asyncio.wait_for(reader.readline(), ASK_S)
            name = line[:MOST_NAME].decode("utf-8", "replace").strip()
            weight = self.weight(name)
            if weight is None:
                if len(self._strangers) < 100 and name not in self._strangers:
                    self._strangers.add(name)
                    known = ", ".join(self._names)
                    logger.warning("HAProxy asks for %r, which is no --replica; accepted: %s", name, known)
            else:
                writer.write(f"{weight}%\n".encode())
                await writer.drain()
        except (TimeoutError, asyncio.TimeoutError, ConnectionError, ValueError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def serve(agent: Agent, host: str, port: int, stop: asyncio.Event, farewell_s: float) -> None:
    """Answer at `host`:`port` until `stop` is set, and for `farewell_s` after it with 100 % for all.

    Raises OSError if the port cannot be had.
    """
    server = await asyncio.start_server(agent.answer, host, port, limit=MOST_NAME)
    agent.gateway.start()
    async with server:
        await stop.wait()
        agent.leaving = True
        await asyncio.sleep(farewell_s)
    agent.gateway.scraper.stop()
