"""An account rides in a request's trace headers, which come out as they went in."""

from __future__ import annotations

import pytest

from energylens_vllm.serving.attribution import Account
from energylens_vllm.serving.trace import ATTRIBUTES, Headers, is_sampled, split, with_account

ACCOUNT = Account("r", 2.5, 0.5, 100, 7, 96, 1.25, True)
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"


@pytest.mark.parametrize("headers", [None, {"traceparent": f"{PARENT}-01", "tracestate": "a=1"}])
def test_headers_come_out_as_they_went_in(headers: Headers) -> None:
    back, attributes = split(with_account(headers, ACCOUNT))
    assert back == headers
    assert attributes.keys() == ATTRIBUTES.keys()
    assert attributes["energylens.energy_j"] == 3.0
    assert attributes["energylens.prefill_energy_j"] == 2.5
    assert attributes["energylens.saved_energy_j"] == 1.25
    assert attributes["energylens.cached_tokens"] == 96


@pytest.mark.parametrize("headers", [None, {}, {"traceparent": f"{PARENT}-01"}])
def test_without_an_account_there_is_nothing_to_say(headers: Headers) -> None:
    assert split(headers) == (headers, {})


@pytest.mark.parametrize(
    ("headers", "sampled"),
    [
        (None, True),
        ({"traceparent": f"{PARENT}-01"}, True),
        ({"traceparent": f"{PARENT}-00"}, False),
        ({"traceparent": f"{PARENT}-03"}, True),
        ({"traceparent": "nonsense"}, True),
        ({"traceparent": f"{PARENT}-zz"}, True),
    ],
)
def test_who_is_sampled(headers: Headers, sampled: bool) -> None:
    assert is_sampled(headers) == sampled
