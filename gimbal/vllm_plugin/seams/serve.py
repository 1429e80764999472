"""``gimbal serve`` runs vLLM's own server."""

from __future__ import annotations

from gimbal.vllm_plugin.seams.table import Seam

SEAMS: tuple[Seam, ...] = (
    Seam(
        "entrypoints.cli.serve",
        "ServeSubcommand.subparser_init",
        ("self", "subparsers"),
        "serve",
        "builds the parser of vLLM's serve command",
        patched=False,
    ),
    Seam(
        "entrypoints.cli.serve",
        "ServeSubcommand.validate",
        ("self", "args"),
        "serve",
        "checks the parsed arguments",
        patched=False,
    ),
    Seam(
        "entrypoints.cli.serve",
        "ServeSubcommand.cmd",
        ("args",),
        "serve",
        "serves until stopped",
        patched=False,
    ),
    Seam(
        "logger",
        "configure_logging_from_args",
        ("args",),
        "serve",
        "as vLLM's console script does before it serves",
        patched=False,
    ),
    Seam(
        "utils.argparse_utils",
        "FlexibleArgumentParser.parse_args",
        ("self", "args", "namespace"),
        "serve",
        "parses vLLM's flags, dotted and from --config files too",
        patched=False,
    ),
    Seam(
        "utils.system_utils",
        "get_mp_context",
        (),
        "serve",
        "asked for spawn, which the zygote answers with forks on CPU",
        patched=False,
    ),
)
