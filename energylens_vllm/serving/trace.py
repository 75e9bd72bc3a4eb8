"""A request's joules on its span: how they get from the engine, which knows them, to the API server, which traces.

vLLM hands a request's trace headers (`traceparent`, ...) through the engine and back with its last output. Its account
rides there as one more header, which is taken off again before vLLM looks at them. No client sees it.

OpenTelemetry's conventions for generative AI have no name for energy, so the attributes are named after us.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # each process of vLLM loads this
    from energylens_vllm.serving.attribution import Account

HEADER = "energylens"
#: attribute of the span -> what it is of an account (see `Account.as_dict`)
ATTRIBUTES = {
    "energylens.energy_j": "joules",
    "energylens.prefill_energy_j": "prefill_joules",
    "energylens.decode_energy_j": "decode_joules",
    "energylens.saved_energy_j": "saved_joules",
    "energylens.cached_tokens": "cached_tokens",
    "energylens.complete": "complete",
}

Headers = Mapping[str, str] | None


def is_sampled(headers: Headers) -> bool:
    """Whether a request with these trace headers gets a span that anybody keeps: unless its caller's `traceparent`
    (version-trace-parent-flags) says that the trace is not sampled."""
    parts = (headers or {}).get("traceparent", "").split("-")
    try:
        return len(parts) < 4 or bool(int(parts[3], 16) & 1)
    except ValueError:
        return True  # vLLM ignores what it cannot read and begins a trace of its own


def with_account(headers: Headers, account: Account) -> dict[str, str]:
    """The headers, and the account."""
    return {**(headers or {}), HEADER: json.dumps(account.as_dict())}


def split(headers: Headers) -> tuple[Headers, dict[str, float | int | bool]]:
    """The headers as they came with the request, and attributes for its span; none if it has no account."""
    if not headers or HEADER not in headers:
        return headers, {}
    account = json.loads(headers[HEADER])
    others = {name: value for name, value in headers.items() if name != HEADER}
    return others or None, {name: account[key] for name, key in ATTRIBUTES.items()}
