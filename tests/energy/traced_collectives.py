"""Collectives that vLLM issues with two tensor-parallel ranks:  python traced_collectives.py MODEL [LLM'S ARGUMENTS]

The arguments are a JSON object. Prints JSON: for each step its tokens, its requests and the calls of one worker, as
[operation, group, ranks, bytes of the message].
"""

from __future__ import annotations

import json
import sys
from typing import Any

#: what each call's message is (docs/collectives.md): the tensor, or what is gathered from all ranks
OPERATIONS = {"all_reduce": 1, "all_gather": 2, "gather": 2, "reduce_scatter": 1, "dispatch": 2, "combine": 1}


class Tracer:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    def start_trace(self) -> None:
        from vllm.distributed.parallel_state import GroupCoordinator

        calls: list[tuple[str, str, int, int]] = []
        self.traced: list[list[Any]] = []

        def traced(name: str, ranks: int) -> None:
            original = getattr(GroupCoordinator, name)

            def call(group: Any, tensor: Any, *arguments: Any, **named: Any) -> Any:
                if group.world_size > 1:
                    size = tensor.numel() * tensor.element_size() * (group.world_size if ranks > 1 else 1)
                    calls.append((name, group.unique_name.split(":")[0], group.world_size, size))
                return original(group, tensor, *arguments, **named)

            setattr(GroupCoordinator, name, call)

        for name, ranks in OPERATIONS.items():
            traced(name, ranks)
        runner = self.model_runner  # type: ignore[attr-defined]
        execute, sample = runner.execute_model, runner.sample_tokens

        def executed(scheduled: Any, *arguments: Any, **named: Any) -> Any:
            counts = scheduled.num_scheduled_tokens
            if not counts:  # nothing to compute: requests that have ended are taken off
                return execute(scheduled, *arguments, **named)
            calls.clear()
            self.traced.append([sum(counts.values()), len(counts), []])
            return noted(execute(scheduled, *arguments, **named))

        def noted(result: Any) -> Any:
            if self.traced:
                self.traced[-1][2] = list(calls)
            return result

        def sampled(*arguments: Any, **named: Any) -> Any:
            return noted(sample(*arguments, **named))

        runner.execute_model, runner.sample_tokens = executed, sampled

    def trace(self) -> Any:
        return self.traced


def main(model: str, arguments: str = "{}") -> None:
    from vllm import LLM, SamplingParams

    fixed = dict(
        load_format="dummy",
        tensor_parallel_size=2,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        worker_extension_cls="traced_collectives.Tracer",
    )
    llm = LLM(model, **fixed | json.loads(arguments))
    llm.collective_rpc("start_trace")
    prompts = [{"prompt_token_ids": list(range(12))}, {"prompt_token_ids": list(range(20, 25))}]
    llm.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    print(json.dumps(llm.collective_rpc("trace")[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
