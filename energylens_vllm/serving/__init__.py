"""What the vLLM plugin does, without vLLM: settings, predictions of steps, their accounting, and the metrics."""
