"""Ray Serve LLM as host of the routing policy: a request router, a server class that reports, an ingress, builders.

Serve pickles a router's module by value, so what routers of a process share is in modules that it only imports
(`fleets`). Nothing is imported here: `import energylens_vllm.hooks.ray` needs no Ray.
"""
