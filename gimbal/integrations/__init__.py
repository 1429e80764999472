"""Gimbal in processes that are not vLLM's: routers before several servers."""
