"""Everything that touches vLLM. Loaded by vLLM itself through ``vllm.general_plugins``."""

from __future__ import annotations


def register() -> None:
    """Entry point of ``vllm.general_plugins``; vLLM calls it in every process, maybe twice.

    Installs the hooks, each inert until a vLLM configuration with a ``gimbal`` section in its
    ``additional_config`` reaches it. Never raises: a broken install must not stop a server.
    """
    from gimbal.vllm_plugin import install

    install.install_all()
