"""A misspelt flag is refused before vLLM is imported; none that vLLM has ever is."""

import sys
from pathlib import Path

import pytest

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.serve.flags import read_flags
from gimbal.vllm_plugin.serve.known_flags import check_flags, known_flags

vllm = pytest.importorskip("vllm")


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--max-modellen", "--max-model-len"),
        ("--tensor-paralel-size=2", "--tensor-parallel-size"),
        ("--enable_eplbb", "--enable-eplb"),
        ("--no-enable-prefix-cachin-g", "--enable-prefix-caching"),
        ("--gimbal-confg", "--gimbal-config"),
        ("--eplb-confg.window_size", "--eplb-config"),
    ],
)
def test_misspelt(flag: str, meant: str) -> None:
    with pytest.raises(InputError, match=rf"vLLM has no such flag \(did you mean '{meant}'"):
        check_flags(read_flags(["model", flag, "1"]).given)


def test_unlike_any_or_short_of_one() -> None:
    given = [
        "m",
        "--zzz",
        "1",
        "--max-model",
        "9",
        "--no-enable-eplb",
        "-tp",
        "2",
        "--eplb-config.a",
        "1",
    ]
    check_flags(read_flags(given).given)
    assert known_flags(Path("/absent")) == set()


def test_every_flag_of_vllm_s_parser_is_known() -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    [subparsers] = [a for a in parser._actions if hasattr(a, "choices") and a.choices]
    actions = subparsers.choices["serve"]._actions
    flags = {word for action in actions for word in action.option_strings if word[:2] == "--"}
    assert len(flags) > 300
    known = known_flags(Path(sys.modules["vllm"].__file__ or "").parent)
    assert not {f for f in flags if f.replace("--no-", "--", 1) not in known} - {"--help"}
