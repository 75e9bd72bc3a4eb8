"""vLLM's engine in this process, for the benchmarks that load it: shapes, recorder, meter.

Importing this sets vLLM's environment, so it comes before any import of vLLM. Weights are random, nothing is
downloaded; the shapes are those of the public models. Times are of `time.perf_counter()`.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_USE_FLASHINFER_SAMPLER="0",
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128256, rope_theta=500000.0,
    max_position_embeddings=131072, rms_norm_eps=1e-5, torch_dtype="bfloat16", hidden_act="silu",
    tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip
QWEN3 = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=151936, head_dim=128, rope_theta=1000000.0,
    max_position_embeddings=40960, rms_norm_eps=1e-6, torch_dtype="bfloat16", hidden_act="silu",
    tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
QWEN3_14B = QWEN3 | dict(
    hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=8
)
QWEN3_32B = QWEN3 | dict(
    hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8
)
QWEN3_30B_A3B = QWEN3 | dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144,
    moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48, num_attention_heads=32,
    num_key_value_heads=4, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip
DEEPSEEK_V2_LITE = dict(
    architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", vocab_size=102400, hidden_size=2048,
    intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27, num_attention_heads=16,
    num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1,
    moe_layer_freq=1, n_group=1, topk_group=1, topk_method="greedy", scoring_func="softmax", norm_topk_prob=False,
    routed_scaling_factor=1.0, rms_norm_eps=1e-6, max_position_embeddings=163840, rope_theta=10000.0,
    hidden_act="silu", attention_bias=False, tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=0,
    eos_token_id=1,
)  # fmt: skip
GPT_OSS_20B = dict(
    architectures=["GptOssForCausalLM"], model_type="gpt_oss", vocab_size=201088, hidden_size=2880,
    intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
    num_local_experts=32, num_experts_per_tok=4, experts_per_token=4, sliding_window=128, attention_bias=True,
    layer_types=["sliding_attention", "full_attention"] * 12, rms_norm_eps=1e-5, rope_theta=150000,
    rope_scaling=dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                      original_max_position_embeddings=4096),
    initial_context_length=4096, max_position_embeddings=131072, hidden_act="silu", swiglu_limit=7.0,
    tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1,
    quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=[
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]),
)  # fmt: skip
_SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
              num_key_value_heads=2, head_dim=32)  # fmt: skip
#: For a trial of a script on vLLM's CPU build: each runs the same code of ours as the model it is made from.
TINY = {
    "llama": LLAMA | _SMALL,
    "qwen3": QWEN3 | _SMALL,
    "qwen3_moe": QWEN3_30B_A3B | _SMALL | dict(num_experts=8, num_experts_per_tok=2,
                                               moe_intermediate_size=64),
}  # fmt: skip

#: Fewer graphs than vLLM's default captures in a third of the time; the recording names them.
CAPTURE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
ON_GPU: dict[str, Any] = dict(
    max_num_seqs=512, max_num_batched_tokens=8192, gpu_memory_utilization=0.92,
    compilation_config=dict(cudagraph_capture_sizes=list(CAPTURE_SIZES)),
)  # fmt: skip
#: vLLM's CPU build: its check of free memory wants a small share, and compiling takes longer than the trial.
ON_CPU: dict[str, Any] = dict(
    max_num_seqs=512, max_num_batched_tokens=2048, gpu_memory_utilization=0.08, enforce_eager=True
)


class Engine:
    """vLLM with a model of random weights. `started_s` is when its start began."""

    def __init__(self, config: dict[str, Any], **arguments: Any) -> None:
        self.started_s = time.perf_counter()
        from vllm import LLM, SamplingParams

        self._parameters = SamplingParams
        self.config = config
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "config.json").write_text(json.dumps(config))
            self.llm = LLM(
                folder, load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=False,
                seed=0, **arguments,
            )  # fmt: skip
        self.llm_engine = self.llm.llm_engine
        self.scheduler = self.llm_engine.engine_core.engine_core.scheduler
        cache = self.llm_engine.vllm_config.cache_config
        self.kv_tokens: int = cache.num_gpu_blocks * cache.block_size
        self.start_s = time.perf_counter() - self.started_s
        self._ids: Iterator[int] = itertools.count()
        self._random = np.random.default_rng(0)

    def route_by_token(self, uneven: bool = False) -> None:
        """Make experts' choice depend on the token, as in a trained model. `uneven`: some experts of each layer are
        chosen far more often than others, as in a model trained without balancing them.

        vLLM's random weights are so small that a router's bias, or one direction of the hidden state that all tokens
        share, may choose the same experts for all of them. Embeddings and routers get the usual spread here (1 and
        1 / sqrt(fan in)), norms 1 and biases 0; all else stays as it is.
        """
        self.llm.apply_model(functools.partial(_route_by_token, uneven=uneven))

    def log(self, text: str) -> None:
        """Print with the seconds since the start."""
        print(f"[{time.perf_counter() - self.started_s:6.1f} s] {text}", flush=True)

    def add(self, prompt_tokens: int, output_tokens: int) -> str:
        """Queue a request of random tokens that generates exactly `output_tokens`; its id."""
        prompt = self._random.integers(10, self.config["vocab_size"] - 10, prompt_tokens).tolist()
        parameters = self._parameters(max_tokens=output_tokens, ignore_eos=True, detokenize=False, temperature=0.0)
        request_id = str(next(self._ids))
        self.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, parameters)
        return request_id

    def step(self) -> int:
        """One engine step; how many requests finished."""
        return sum(output.finished for output in self.llm_engine.step())

    @property
    def busy(self) -> bool:
        return bool(self.llm_engine.has_unfinished_requests())

    def drop_all(self) -> None:
        """Abort what is unfinished and take back what is in flight, so that no step is left half done."""
        core = self.llm_engine.engine_core.engine_core
        self.llm_engine.abort_request(list(self.scheduler.requests), internal=True)
        while self.busy or self.scheduler.has_requests() or core.batch_queue:
            self.step()


class Recorder:
    """Notes every step of an engine's scheduler while it is attached, in the format of docs/formats.md."""

    def __init__(self, engine: Engine) -> None:
        self.phase = "start"
        self._scheduler = engine.scheduler
        self._rows: list[list[Any]] = []  # [schedule start, schedule end, update end, phase, new, computed]
        self._in_flight: dict[int, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def attach(self) -> None:
        """Begin to note steps. Methods of this one scheduler are replaced, and `detach` uncovers its class's own."""
        schedule, update = self._scheduler.schedule, self._scheduler.update_from_output

        def recorded_schedule(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            output = schedule(*args, **kwargs)
            if not output.total_num_scheduled_tokens:
                return output
            old, tokens = output.scheduled_cached_reqs, output.num_scheduled_tokens
            ids = [*old.req_ids, *(request.req_id for request in output.scheduled_new_reqs)]
            computed = [*old.num_computed_tokens, *(r.num_computed_tokens for r in output.scheduled_new_reqs)]
            new = np.array([tokens[i] for i in ids], dtype=np.int32)
            row = [start_s, time.perf_counter(), 0.0, self.phase, new, np.array(computed, dtype=np.int32)]
            self._rows.append(row)
            self._in_flight[id(output)] = row
            return output

        def recorded_update(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = update(scheduler_output, *args, **kwargs)
            if (row := self._in_flight.pop(id(scheduler_output), None)) is not None:
                row[2] = time.perf_counter()
            return outputs

        self._scheduler.schedule, self._scheduler.update_from_output = recorded_schedule, recorded_update

    def detach(self) -> None:
        """Leave the scheduler as it was."""
        del self._scheduler.schedule, self._scheduler.update_from_output
        self._in_flight.clear()

    def between(self, start_s: float, end_s: float) -> list[list[Any]]:
        """The rows of the steps scheduled in this time."""
        return [row for row in self._rows if start_s <= row[0] <= end_s]

    def arrays(self) -> dict[str, Any]:
        """The arrays of the steps so far."""
        rows = list(self._rows)
        phases = sorted({row[3] for row in rows})
        empty = [np.empty(0, dtype=np.int32)]
        return dict(
            t0=np.array([row[0] for row in rows]), t1=np.array([row[1] for row in rows]),
            t2=np.array([row[2] for row in rows]), phases=np.array(phases),
            phase=np.array([phases.index(row[3]) for row in rows], dtype=np.int16),
            off=np.cumsum([0] + [len(row[4]) for row in rows]),
            n=np.concatenate(empty + [row[4] for row in rows]), c=np.concatenate(empty + [row[5] for row in rows]),
        )  # fmt: skip


class Meter(threading.Thread):
    """Reads the energy counter and the power of one GPU in the background.

    The counter advances about each 100 ms and a reading takes 4 ms, so its changes are what says when it was what: one
    is looked for from a while after the last, and lies between the last reading before it and the first after it.
    """

    QUIET_S = 0.07  #: no change is expected so soon after one; halved whenever the first look came too late
    POLL_S = 0.002
    POWER_S = 0.02

    def __init__(self, gpu: int = 0) -> None:
        super().__init__(name=f"meter-{gpu}", daemon=True)
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        self._gpu = pynvml.nvmlDeviceGetHandleByIndex(gpu)
        #: (s, mJ, SM clock MHz, degrees C, memory clock MHz, throttle reasons) for each change of the counter
        self.changes: list[tuple[float, float, float, float, float, float]] = []
        self.power: list[tuple[float, float]] = []  #: (s, mW)
        self._stopped = threading.Event()

    def device(self) -> dict[str, Any]:
        """What the GPU says of itself."""
        nvml, gpu = self._nvml, self._gpu
        return dict(
            name=_text(nvml.nvmlDeviceGetName(gpu)), driver=_text(nvml.nvmlSystemGetDriverVersion()),
            memory_bytes=nvml.nvmlDeviceGetMemoryInfo(gpu).total,
            power_limit_w=nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
            max_sm_clock_mhz=nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
            max_memory_clock_mhz=nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            temperature_c=nvml.nvmlDeviceGetTemperature(gpu, 0),
        )  # fmt: skip

    def run(self) -> None:
        nvml, gpu, quiet_s = self._nvml, self._gpu, self.QUIET_S
        value, read_s = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu), time.perf_counter()
        changed_s, rested = float("-inf"), False
        while not self._stopped.is_set():
            now_s = time.perf_counter()
            if not self.power or now_s - self.power[-1][0] >= self.POWER_S:
                self.power.append((now_s, nvml.nvmlDeviceGetPowerUsage(gpu)))
            if (rest_s := changed_s + quiet_s - now_s) > 0:
                rested = True
                time.sleep(min(self.POWER_S, rest_s))
                continue
            new_value, new_s = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu), time.perf_counter()
            if new_value != value:
                if rested:  # too late to say when it changed
                    quiet_s /= 2
                else:
                    self.changes.append((
                        (read_s + new_s) / 2, new_value, nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
                        nvml.nvmlDeviceGetTemperature(gpu, 0), nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
                        self._throttle_reasons(),
                    ))  # fmt: skip
                value, changed_s = new_value, new_s
            rested, read_s = False, new_s
            time.sleep(self.POLL_S)

    def _throttle_reasons(self) -> float:
        """NVML's bits, NaN where the driver or its library does not say."""
        try:
            return float(self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._gpu))
        except (AttributeError, self._nvml.NVMLError):
            return float("nan")

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def window(self, start_s: float, end_s: float) -> dict[str, float] | None:
        """What was measured from the first to the last change of the counter in this time; None without two."""
        inside = [change for change in list(self.changes) if start_s <= change[0] <= end_s]
        if len(inside) < 2:
            return None
        (begin_s, begin_mj), (last_s, last_mj) = inside[0][:2], inside[-1][:2]
        sampled = [watts for at, watts in list(self.power) if begin_s <= at <= last_s]
        energy_j = (last_mj - begin_mj) / 1e3
        return dict(
            start_s=begin_s, end_s=last_s, duration_s=last_s - begin_s, energy_j=energy_j,
            power_w=energy_j / (last_s - begin_s), sampled_power_w=float(np.mean(sampled)) / 1e3,
            sm_clock_mhz=float(np.mean([change[2] for change in inside])),
            temperature_c=float(np.mean([change[3] for change in inside])),
        )  # fmt: skip


class Meters:
    """A `Meter` for each of the first `gpus` GPUs: energy and power summed over them, the first one's clocks."""

    def __init__(self, gpus: int) -> None:
        self._meters = [Meter(gpu) for gpu in range(gpus)]

    def start(self) -> None:
        for meter in self._meters:
            meter.start()

    def stop(self) -> None:
        for meter in self._meters:
            meter.stop()

    def device(self) -> dict[str, Any]:
        return self._meters[0].device() | dict(gpus=len(self._meters))

    def window(self, start_s: float, end_s: float) -> dict[str, float] | None:
        """As `Meter.window`; each GPU's power is of its own first to last change, and they share the first's times."""
        windows = [window for meter in self._meters if (window := meter.window(start_s, end_s))]
        if len(windows) < len(self._meters):
            return None
        summed = {key: sum(window[key] for window in windows) for key in ("power_w", "sampled_power_w")}
        return windows[0] | summed | dict(energy_j=summed["power_w"] * windows[0]["duration_s"])

    @property
    def changes(self) -> list[tuple[float, ...]]:
        """The first GPU's changes, with the other counters as they stood then added to its own."""
        return self._summed([list(meter.changes) for meter in self._meters])

    @property
    def power(self) -> list[tuple[float, ...]]:
        return self._summed([list(meter.power) for meter in self._meters])

    @staticmethod
    def _summed(series: list[list[tuple[float, ...]]]) -> list[tuple[float, ...]]:
        if not all(series):
            return []
        first, *others = [np.array(rows) for rows in series]
        for other in others:
            first[:, 1] += np.interp(first[:, 0], other[:, 0], other[:, 1])
        return [tuple(row) for row in first.tolist()]


def save(path: pathlib.Path, recorder: Recorder, meter: Meter | Meters, engine: Engine) -> None:
    """Write what was recorded so far; a run that is cut off later keeps it."""
    sizes = engine.llm_engine.vllm_config.compilation_config.cudagraph_capture_sizes or []
    np.savez_compressed(
        path, **recorder.arrays(), pw=np.array(list(meter.power)), en=np.array(list(meter.changes)),
        capture_sizes=np.array(sorted(sizes), dtype=np.int32),
    )  # fmt: skip


def _route_by_token(model: Any, uneven: bool) -> None:
    """Runs in each worker; one seed, so that what is replicated stays equal."""
    import torch

    random_numbers = torch.Generator(next(model.parameters()).device).manual_seed(0)
    # What all tokens have in common, and what makes a router like one expert more than another.
    common = torch.empty(model.config.hidden_size, device=random_numbers.device).normal_(generator=random_numbers)
    for name, weight in model.named_parameters():
        if not weight.numel():  # packed away, as linear layers are on CPUs
            continue
        if "norm" in name and name.endswith("weight"):
            weight.data.fill_(1.0)
        elif "embed_tokens" in name or name.endswith("embedding.weight"):  # gpt-oss
            weight.data.normal_(0.0, 1.0, generator=random_numbers)
            if uneven:
                weight.data.add_(common.to(weight.dtype))
        elif name.endswith(("mlp.gate.weight", "router.weight")):
            drawn = torch.empty(weight.shape, device=weight.device).normal_(generator=random_numbers)
            if uneven:  # a token's share of `common` is 1 / sqrt(2), and a router's outputs spread by 1
                liked = torch.empty(len(weight), 1, device=weight.device).normal_(generator=random_numbers)
                drawn = drawn + liked * common * weight.shape[-1] ** -0.5
            # What is quantized has a scale of its own; only the order of a router's outputs matters.
            weight.data.copy_(drawn * (64.0 if weight.element_size() == 1 else weight.shape[-1] ** -0.5))
        elif name.endswith("bias"):  # the same for all tokens
            weight.data.zero_()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
