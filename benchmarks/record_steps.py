"""Record scheduler steps, power and energy of real vLLM under steady and mixed load on one GPU.

    python benchmarks/record_steps.py llama8b-fp8 out/llama8b_fp8.npz

Random weights, the engine in this process, prompts of random tokens. Writes the step format that `energylens replay`
reads (docs/formats.md) and, beside it, one CSV row per steady window. Needs vLLM and one NVIDIA GPU. The shapes are
those of the public models; no weights are downloaded.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
import random
import sys
import threading
import time

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_USE_FLASHINFER_SAMPLER="0",
)

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
QWEN3_MOE = QWEN3 | dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144,
    moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48, num_attention_heads=32,
    num_key_value_heads=4, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip
GPT_OSS = dict(
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
QWEN3_32B = QWEN3 | dict(
    hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8
)
QWEN3_14B = QWEN3 | dict(
    hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=8
)
#: Fewer graphs than vLLM's default captures in a third of the time; replay pads to these (the file names them).
CAPTURE_SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
GRAPHS: dict = dict(compilation_config=dict(cudagraph_capture_sizes=CAPTURE_SIZES))
#: name -> (config, LLM arguments, decode points [(context, batch sizes)], prompt lengths, mixed-load rates per second)
FAST = [(256, (1, 4, 16, 32, 64, 128, 256)), (2048, (1, 8, 32, 128)), (8000, (4, 24))]
SLOW = [(256, (1, 4, 16, 64, 128, 256)), (2048, (1, 8, 48)), (8000, (6,))]
PROMPTS = (64, 512, 2048, 8192)
CASES: dict[str, tuple[dict, dict, list, tuple, tuple]] = {
    "llama8b": (LLAMA, {}, FAST, PROMPTS, (4, 16)),
    "llama8b-fp8": (LLAMA, dict(quantization="fp8"), FAST, PROMPTS, (4, 16)),
    "llama8b-eager": (LLAMA, dict(enforce_eager=True), [(256, (1, 16, 64, 256))], (512, 8192), (4,)),
    "llama8b-fp8kv": (LLAMA, dict(kv_cache_dtype="fp8"), [(2048, (1, 32, 128))], (2048,), ()),
    "qwen32b": (QWEN3_32B, {}, SLOW, PROMPTS, (1, 4)),
    "qwen14b": (QWEN3_14B, {}, SLOW, PROMPTS, (2, 8)),
    "qwen30b": (QWEN3_MOE, {}, FAST, PROMPTS, (4, 16)),
    "qwen30b-fp8": (QWEN3_MOE, dict(quantization="fp8"), FAST, PROMPTS, (4, 16)),
    "gptoss20b": (GPT_OSS, {}, FAST, PROMPTS, (4, 16)),
}


def main() -> None:
    started = time.time()
    name, out = sys.argv[1], pathlib.Path(sys.argv[2])
    window_s = float(os.environ.get("WINDOW_S", "1.5"))
    config, arguments, decodes, prompts, rates = CASES[name]
    folder = pathlib.Path(f"/tmp/model_{name}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))

    import numpy as np
    import pynvml
    from vllm import LLM, SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler

    steps: list[list] = []  # [schedule start, schedule end, phase, [(new, computed)], update end]
    phase = ["load"]
    schedule, update = Scheduler.schedule, Scheduler.update_from_output
    waiting: dict[int, list] = {}

    def recorded_schedule(self, *args, **kwargs):
        t0 = time.perf_counter()
        output = schedule(self, *args, **kwargs)
        requests = [
            (n, self.requests[r].num_computed_tokens - n if r in self.requests else -1)
            for r, n in output.num_scheduled_tokens.items()
        ]
        row = [t0, time.perf_counter(), phase[0], requests, 0.0]
        steps.append(row)
        waiting[id(output)] = row
        return output

    def recorded_update(self, scheduler_output, model_output):
        result = update(self, scheduler_output, model_output)
        if row := waiting.pop(id(scheduler_output), None):
            row[4] = time.perf_counter()
        return result

    Scheduler.schedule, Scheduler.update_from_output = recorded_schedule, recorded_update
    llm = LLM(
        str(folder), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, max_model_len=16384,
        max_num_seqs=512, max_num_batched_tokens=8192, enable_prefix_caching=False, gpu_memory_utilization=0.9,
        seed=0, disable_log_stats=True, **GRAPHS | arguments,
    )  # fmt: skip
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    cache = engine.vllm_config.cache_config
    print(f"{name} loaded in {time.time() - started:.0f} s, KV tokens {cache.num_gpu_blocks * cache.block_size}", flush=True)

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    power, counter = [], []
    stop = threading.Event()

    def sample() -> None:
        tick = 0
        while not stop.wait(0.02):
            power.append((time.perf_counter(), pynvml.nvmlDeviceGetPowerUsage(gpu)))
            if tick % 5 == 0:
                energy = pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
                counter.append((
                    time.perf_counter(), energy, pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
                    pynvml.nvmlDeviceGetTemperature(gpu, 0), pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
                    pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
                ))  # fmt: skip
            tick += 1

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    points: list[dict] = []
    next_id = iter(range(10**9))

    def add(prompt_tokens: int, output_tokens: int) -> str:
        request_id = str(next(next_id))
        prompt = [random.randrange(10, config["vocab_size"] - 10) for _ in range(prompt_tokens)]
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, detokenize=False, temperature=0.0)
        engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        return request_id

    def run_for(seconds: float) -> tuple[float, float]:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            engine.step()
        return start, time.perf_counter()

    def mark(start: float, end: float) -> None:
        ticks = [c for c in counter if start <= c[0] <= end]
        watts = (ticks[-1][1] - ticks[0][1]) / 1e3 / (ticks[-1][0] - ticks[0][0]) if len(ticks) > 1 else float("nan")
        inside = [s for s in steps if start <= s[0] <= end]
        tokens = sum(n for s in inside for n, _ in s[3])
        seconds = end - start
        points.append(dict(
            point=phase[0], window_s=round(seconds, 4), steps=len(inside), tokens=tokens,
            prefill_tokens=sum(n for s in inside for n, _ in s[3] if n > 1), power_w=round(watts, 2),
            energy_j=round(watts * seconds, 2), mean_step_s=seconds / max(1, len(inside)),
            energy_per_step_j=watts * seconds / max(1, len(inside)),
            mean_sm_clock_mhz=sum(c[2] for c in ticks) / max(1, len(ticks)),
            gpu_temp_c=sum(c[3] for c in ticks) / max(1, len(ticks)),
        ))  # fmt: skip
        print(f"{phase[0]:22s} {watts:6.1f} W {seconds / max(1, len(inside)) * 1e3:8.3f} ms "
              f"{points[-1]['mean_sm_clock_mhz']:.0f} MHz, at {time.time() - started:.0f} s", flush=True)  # fmt: skip

    def drain(ids: list[str]) -> None:
        phase[0] = "drain"
        if ids:
            engine.abort_request(ids)
        while engine.has_unfinished_requests():
            engine.step()

    def idle(seconds: float) -> None:
        phase[0] = "idle"
        start = time.perf_counter()
        time.sleep(seconds)
        mark(start, time.perf_counter())

    def decode(context: int, batches: tuple[int, ...]) -> None:
        ids: list[str] = []
        for batch in batches:
            if batch * (context + 600) > cache.num_gpu_blocks * cache.block_size * 0.95:
                break
            phase[0] = "fill"
            ids += [add(context, 16000 - context) for _ in range(batch - len(ids))]
            while len(scheduler.running) < batch or scheduler.waiting or any(
                request.num_computed_tokens < context for request in scheduler.running
            ):
                engine.step()
            phase[0] = f"decode_b{batch}_c{context}"
            run_for(0.5)
            mark(*run_for(window_s))
        drain(ids)
        save()

    def prefill(length: int) -> None:
        phase[0] = f"prefill_l{length}"
        need = max(4, 2 * 8192 // length)

        def feed(seconds: float) -> tuple[float, float]:
            start = time.perf_counter()
            while time.perf_counter() - start < seconds:
                while len(scheduler.waiting) + len(scheduler.running) < need:
                    add(length, 1)
                engine.step()
            return start, time.perf_counter()

        feed(0.5)
        mark(*feed(window_s))
        drain(list(scheduler.requests))

    def mixed(rate: float, seconds: float) -> None:
        phase[0] = f"mix_r{rate}"
        draw = random.Random(int(rate))
        start = arrival = time.perf_counter()
        while (now := time.perf_counter()) - start < seconds:
            while arrival <= now:
                prompt = int(min(8000, max(16, draw.lognormvariate(6.397, 0.8))))  # median 600
                output = int(min(2000, max(4, draw.lognormvariate(5.298, 0.6))))  # median 200
                add(prompt, output)
                arrival += draw.expovariate(rate)
            if engine.has_unfinished_requests():
                engine.step()
            else:
                time.sleep(0.001)
        mark(start, time.perf_counter())
        drain(list(scheduler.requests))

    def save() -> None:
        done = [s for s in steps if s[2] not in ("load",)]
        phases = sorted({s[2] for s in done})
        index = {p: i for i, p in enumerate(phases)}
        np.savez_compressed(
            out, t0=np.array([s[0] for s in done]), t1=np.array([s[1] for s in done]),
            t2=np.array([s[4] for s in done]), phase=np.array([index[s[2]] for s in done], dtype=np.int16),
            phases=np.array(phases), off=np.cumsum([0] + [len(s[3]) for s in done]),
            n=np.array([n for s in done for n, _ in s[3]], dtype=np.int32),
            c=np.array([c for s in done for _, c in s[3]], dtype=np.int32), pw=np.array(power), en=np.array(counter),
            capture_sizes=np.array(CAPTURE_SIZES),
        )  # fmt: skip
        with open(out.with_name(out.stem + "_points.csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, list(points[0]))
            writer.writeheader()
            writer.writerows(points)

    idle(2.0)
    for length in prompts:
        prefill(length)
    for context, batches in decodes:
        decode(context, batches)
    save()
    for rate in rates:
        mixed(rate, 8.0)
    idle(2.0)
    stop.set()
    sampler.join()
    save()
    print(f"{name} total {time.time() - started:.0f} s", flush=True)
    os._exit(0)  # the engine's own shutdown takes seconds of GPU time


if __name__ == "__main__":
    main()
