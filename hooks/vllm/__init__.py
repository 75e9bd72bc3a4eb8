"""The vLLM plugin: `register` is what vLLM finds by the entry point `energylens` and calls in each of its processes.

What is changed in vLLM, all of it in memory and by name, so that a release that lacks a name is noticed:

| where | what for | module |
| --- | --- | --- |
| `EngineArgs.add_cli_args`, `create_engine_config` | `--plugin`, `--energylens` and their early check | `flags` |
| `SchedulerConfig.get_scheduler_cls` | a subclass of the configured scheduler, which sees each batch | `scheduler` |
| `EngineCoreProc.run_busy_loop`, `execute_dummy_batch` | the reporting thread, steps without requests | `engine` |
| `DPLBAsyncMPClient.get_core_engine_for_request` | steers data-parallel ranks, with `steer_ranks` | `ranks` |
| `SyncMPClient.__init__` | tells the engine of an offline `LLM` that nobody listens while it is idle | `engine` |
| `SchedulerStats` | one more field, which carries reports to the API servers | `transport` |
| `StatLoggerManager.__init__` | one more stat logger, which exports them | `stat_logger` |
| `OutputProcessor.do_tracing`, `instrument_manual` | a request's joules on its span, where vLLM traces | `tracing` |
| `Worker.load_model` | counts how tokens choose experts, with `learn_expert_routing` | `expert_counts` |
"""

from __future__ import annotations

from energylens_vllm.hooks.vllm import status


def register() -> None:
    """Prepare this process. Without `--plugin energylens` no failure leaves here: vLLM would stop."""
    try:
        from energylens_vllm.hooks.vllm import (
            engine,
            expert_counts,
            flags,
            late,
            log,
            ranks,
            scheduler,
            stat_logger,
            tracing,
            transport,
        )

        log.follow_vllm()
        late.when_imported("vllm.engine.arg_utils", flags.install)
        late.when_imported("vllm.config.scheduler", scheduler.install)
        late.when_imported("vllm.v1.engine.core", engine.install)
        late.when_imported("vllm.v1.engine.core_client", engine.install_client)
        late.when_imported("vllm.v1.engine.core_client", ranks.install)
        late.when_imported("vllm.v1.metrics.stats", transport.install)
        late.when_imported("vllm.v1.metrics.loggers", stat_logger.install)
        late.when_imported("vllm.v1.engine.output_processor", tracing.install)
        late.when_imported("vllm.v1.worker.gpu_worker", expert_counts.install)
    except Exception as error:
        status.unusable(error)
