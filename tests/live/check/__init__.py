"""Checks of a live expert-parallel server: right answers, and endurance.

Each is one command: ``python -m tests.live.check.correctness`` and ``.soak``.
"""
