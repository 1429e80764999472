"""The demo model: a tiny Mixture-of-Experts made from a seed, and prompts that drive it.

`model` writes a Hugging Face folder that vLLM serves; `manifest` reads the ``gimbal_demo.json``
beside it and writes prompts by domain. Nothing here imports torch.
"""
