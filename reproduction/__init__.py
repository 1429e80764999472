"""The paper's evaluation again, simulated and live; run by ``gimbal reproduce`` from a checkout."""
