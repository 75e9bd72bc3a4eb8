"""What is done for single requests, where they have accounts: who asks, who has gone, and the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from energylens_vllm.serving import trace
from energylens_vllm.serving.observer import StepObserver
from energylens_vllm.serving.response import KEY, asks


def scheduled(observer: StepObserver, output: Any) -> None:
    """Look at a SchedulerOutput's new and finished requests."""
    for request in output.scheduled_new_reqs:
        if request.sampling_params is not None and asks(request.sampling_params.extra_args):
            observer.asking.add(request.req_id)
    if output.finished_req_ids:
        observer.asking.difference_update(output.finished_req_ids)
        if observer.attribution is not None:  # its batch names them too, if it has one and that is not lost
            observer.attribution.finish(output.finished_req_ids, observer.clock())


def answer(observer: StepObserver, outputs: Mapping[int, Any], traced: bool = False) -> None:
    """Tell the requests among an engine step's outputs that have finished and asked; and if vLLM traces, the spans of
    all that have finished and are sampled."""
    asking = observer.asking
    finished = [
        (output, output.request_id in asking, traced and trace.is_sampled(output.trace_headers))
        for each in outputs.values()
        for output in each.outputs
        if output.finish_reason is not None
    ]
    if observer.attribution is None or not any(asked or sampled for _, asked, sampled in finished):
        return
    observer.report()  # with the step that has just ended
    for output, asked, sampled in finished:
        asking.discard(output.request_id)
        account = observer.attribution.account(output.request_id) if asked or sampled else None
        if asked and account is not None:
            output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: account.as_dict()}
        if sampled and account is not None:
            output.trace_headers = trace.with_account(output.trace_headers, account)
