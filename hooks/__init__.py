"""Every place where another process calls us: vLLM, Ray Serve and LiteLLM load what is in here, nothing else does."""
