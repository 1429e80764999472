"""Gimbal: coordinated dispatch, queueing and expert placement for MoE serving on vLLM."""

__version__ = "0.1.0"
