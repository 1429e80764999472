"""Command lines and configuration files as vLLM's own parser reads them."""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from gimbal.commands import serve
from gimbal.core.errors import InputError
from gimbal.vllm_plugin import versions
from gimbal.vllm_plugin.serve import checks
from gimbal.vllm_plugin.serve.command_line import parse, table_path, vllm_table
from gimbal.vllm_plugin.serve.flags import read_flags

vllm = pytest.importorskip("vllm")
VERSION = checks.installed_vllm().version
SCRIPT = Path(__file__).parents[3] / "scripts" / "vllm_tables.py"
LINES = 200


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("vllm_tables", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def theirs() -> Any:
    """vLLM's own reading of the words behind ``vllm serve``."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return lambda words: parser.parse_args(["serve", *words])


def test_the_table_has_every_flag_of_vllm_s_parser(script: Any) -> None:
    release, _, _ = VERSION.partition("+")  # behind it stands what the wheel was built for
    assert vllm_table(VERSION)["version"] == release
    assert vllm_table(VERSION)["flags"] == script.flags(script.serve_parser())


def test_every_supported_version_has_a_table() -> None:
    for major, minor in versions.SUPPORTED:
        version = f"{major}.{minor}.0"
        assert table_path(version).exists()
        assert read_flags(["m", "--no-enable-eplb", "--port", "81"], version).port == 81


def test_vllm_0_33_has_another_way_to_switch_off() -> None:
    assert not read_flags(["m", "--enable-eplb", "--disable-eplb"], "0.33.0").eplb
    assert read_flags(["m", "--disable_eplb", "--enable_eplb"], "0.33.0").eplb
    with pytest.raises(InputError, match="--disable-eplb: vLLM has no such flag"):
        read_flags(["m", "--disable-eplb"], "0.32.0")


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0"])
def test_the_classes_that_cannot_do_eplb_are_no_moe_classes_with_it(version: str) -> None:
    names = vllm_table(version)["without_eplb"]
    assert {"LlamaForCausalLM", "GptOssForCausalLM"} <= set(names)
    assert not {"Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "MixtralForCausalLM"} & set(names)


class Lines:
    """Random command lines: the flags that Gimbal must know among others, in every spelling."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.switches = [f for f in vllm_table(VERSION)["flags"] if "off" in f]

    def make(self) -> list[str]:
        draw = self.random
        parts = draw.sample(self._parts(), draw.randint(1, 9))
        switches = draw.sample(self.switches, draw.randint(0, 3))
        parts += [[draw.choice(flag["flags"] + flag["off"])] for flag in switches]
        parts = [self._spelt(part) for part in parts]
        draw.shuffle(parts)
        in_file = draw.random() < 0.4
        model_in_file = in_file and draw.random() < 0.5
        if not model_in_file:
            # Behind a list the model would be one more of its items, for vLLM too.
            place = draw.choice([0, *(i + 1 for i, p in enumerate(parts) if len(p) < 3)])
            place = 0 if in_file or self._names(parts) else place
            model = draw.choice([["org/model"], ["--model", "org/model"], ["--model=org/model"]])
            parts.insert(place, model)
        if in_file:
            parts.append(["--config", str(self._file(model_in_file))])
        return [word for part in parts for word in part]

    def _parts(self) -> list[list[str]]:
        draw = self.random
        size = lambda: str(draw.choice((1, 2, 4, 8)))  # noqa: E731
        return [
            ["--port", str(draw.randint(1024, 65535))],
            ["--host", draw.choice(("127.0.0.1", "0.0.0.0", "::1", "::", "localhost"))],
            [draw.choice(("--data-parallel-size", "-dp")), size()],
            [draw.choice(("--tensor-parallel-size", "-tp")), size()],
            [draw.choice(("--enable-expert-parallel", "-ep", "--no-enable-expert-parallel"))],
            [draw.choice(("--enable-eplb", "--no-enable-eplb"))],
            ["--eplb-config", '{"num_redundant_experts": 8}'],
            ["--eplb-config.num_redundant_experts", size()],
            ["--served-model-name", "one", "two"],
            ["--max-model-len", draw.choice(("4096", "4k", "auto"))],
            ["--max-num-batched-tokens", draw.choice(("8K", "2.5k", "1024"))],
            ["--seed", "-1"],
            ["--gpu-memory-utilization", "0.8"],
            [draw.choice(("-O3", "-O=2"))],
            ["--hf-overrides.a.b", "1"],
            ["--additional-config", '{"x": 1}'],
            ["--tensor-parallel-siz", size()],  # argparse takes any beginning
        ]

    def _spelt(self, part: list[str]) -> list[str]:
        flag, *values = part
        if flag.startswith("--") and self.random.random() < 0.3:
            head, dot, tail = flag[2:].partition(".")
            flag = "--" + head.replace("-", "_") + dot + tail
        if len(values) == 1 and flag.startswith("--") and self.random.random() < 0.3:
            return [f"{flag}={values[0]}"]
        return [flag, *values]

    def _names(self, parts: list[list[str]]) -> bool:
        return any("served" in part[0] for part in parts)

    def _file(self, model: bool) -> Path:
        draw = self.random
        settings: dict[str, Any] = {
            "port": draw.randint(1024, 65535),
            "host": "127.0.0.1",
            "data-parallel-size": draw.choice((1, 2)),
            "tensor_parallel_size": 2,
            "enable-expert-parallel": draw.random() < 0.5,
            "enable_eplb": draw.random() < 0.7,
            "eplb-config": {"num_redundant_experts": 4},
            "enable-prefix-caching": False,
            "served-model-name": ["a", "b"],
        }
        chosen = draw.sample(list(settings.items()), draw.randint(1, len(settings)))
        document = dict(chosen) | ({"model": "file/model"} if model else {})
        path = self.folder / f"{draw.getrandbits(32)}.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path


def of_vllm(found: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": found.model_tag or found.model,
        "served_name": found.served_model_name[0] if found.served_model_name else None,
        "port": found.port,
        "host": found.host,
        "dp": found.data_parallel_size,
        "tp": found.tensor_parallel_size,
        "expert_parallel": found.enable_expert_parallel,
        "eplb": found.enable_eplb,
        "redundant_experts": found.eplb_config.num_redundant_experts,
    }


def test_a_dry_run_reads_generated_command_lines_as_vllm_does(
    theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_port", lambda host, port: None)
    lines = Lines(16, tmp_path)
    seen = []
    for _ in range(LINES):
        words = lines.make()
        wanted = of_vllm(theirs(words))
        flags = read_flags(words, VERSION)
        assert {name: getattr(flags, name) for name in wanted} == wanted, words
        done = CliRunner().invoke(serve.command, [*words, "--dry-run"])
        assert done.exception is None, (words, done.output)
        _, _, command = done.stdout.partition("gimbal.vllm_plugin.serve.server ")
        # What is started is told the same, and Gimbal's settings besides.
        assert of_vllm(theirs(shlex.split(command))) == wanted, words
        seen.append(tuple(map(repr, wanted.values())))
    assert len(set(seen)) > LINES / 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-modellen", "1"], "--max-modellen: vLLM has no such flag .*'--max-model-len'"),
        (["--tensor-paralel-size=2"], "--tensor-paralel-size: .* mean '--tensor-parallel-size'"),
        (["--enable_eplbb"], "--enable-eplbb: .* mean '--enable-eplb'"),
        (["--eplb-confg.window_size", "1"], "--eplb-confg: .* mean '--eplb-config'"),
        (["--gimbal-confg", "f"], "--gimbal-confg: .* mean '--gimbal-config'"),
        (["--zzz", "1"], "--zzz: vLLM has no such flag$"),
        (["n"], "n: one word too many"),
        (["--port"], "--port: expected one argument"),
        (["--port", "x"], "--port: invalid int value: 'x'"),
        (["--max-model-len", "4q"], "--max-model-len: invalid size value: '4q'"),
        (["--eplb-config.window_size"], "--eplb-config.window_size: needs a value"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: cannot be read: No such file"),
        (["--config", "f.json"], "--config: Config file must be of a yaml"),
        (["-h"], "-h: try gimbal serve --help"),
    ],
)
def test_what_vllm_refuses_is_refused_at_once(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(["m", *words], VERSION)


@pytest.mark.parametrize("text", ["- a", "", "port: [", "port: x", "portt: 1"])
def test_a_configuration_file_that_vllm_would_not_take(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        parse(["m", "--config", str(path)], VERSION)
    assert re.fullmatch(r"--(config|port).*", str(caught.value))


def test_another_patch_release_may_have_flags_that_the_table_has_not() -> None:
    assert read_flags(["m", "--zzz", "--port", "81"], "0.32.9").port == 81
    with pytest.raises(InputError, match="did you mean"):
        read_flags(["m", "--max-modellen", "1"], "0.32.9")
    with pytest.raises(InputError, match="--zzz: vLLM has no such flag"):
        read_flags(["m", "--zzz"], "0.32.0+cpu")


def test_vllm_is_not_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from gimbal.vllm_plugin.serve.flags import read_flags; "
        f"read_flags(['m', '-dp', '2'], {VERSION!r}); "
        "sys.exit(any(name.split('.')[0] in ('vllm', 'torch') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
