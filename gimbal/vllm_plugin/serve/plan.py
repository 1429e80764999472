"""From the command line of ``gimbal serve`` to a checked vLLM command and its environment."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gimbal.core.config import GimbalConfig
from gimbal.core.config_sources import merge_config, parse_levels, read_config_file, to_mapping
from gimbal.core.errors import InputError
from gimbal.core.files import writing
from gimbal.vllm_plugin.cpu_backend.binding import bind_workers, usable_cores
from gimbal.vllm_plugin.serve import checks
from gimbal.vllm_plugin.serve.flags import VllmFlags, read_flags
from gimbal.vllm_plugin.serve.known_flags import check_flags
from gimbal.vllm_plugin.versions import MEMORY_FOLLOWS_CORES, off_spellings

DEMO_NAME = "gimbal-demo"

# What `--demo` sets unless the command line says otherwise: lock-step engines that can move
# experts on any machine, a KV pool of 256 MiB per engine (about 260,000 tokens of the demo model),
# and EPLB intervals short enough to watch.
_DEMO_VALUES: tuple[tuple[str, str], ...] = (
    ("--served-model-name", DEMO_NAME),
    ("--data-parallel-size", "2"),
    ("--api-server-count", "1"),
    ("--max-model-len", "8192"),
    ("--max-num-batched-tokens", "512"),
    ("--kv-cache-memory-bytes", str(256 << 20)),
    ("--seed", "0"),
)
_DEMO_SWITCHES = ("--enable-expert-parallel", "--enable-eplb", "--enforce-eager")
# oneDNN keeps a compiled kernel, some 100 KiB, for each of the last 1,024 batch shapes; under
# continuous batching nearly every step has a new one, so a worker would grow for hours.
_ONEDNN_KERNELS = "64"
_BINDING, _NO_CORES_NAMED = "VLLM_CPU_OMP_THREADS_BIND", ("auto", "nobind")
_OWN_MEMORY_NODES = "CPU_VISIBLE_MEMORY_NODES"
_DEMO_EPLB = {"window_size": 100, "step_interval": 200, "communicator": "torch_gloo"}


@dataclass(frozen=True, slots=True)
class ServePlan:
    """One server, ready to start.

    Attributes:
        arguments: for vLLM's ``serve`` parser, the model first.
        environment: variables added to this process's own.
        config: Gimbal's effective configuration.
        url: base of the OpenAI API, ``/v1`` included.
        model: name to ask for in requests.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]
    config: GimbalConfig
    url: str
    model: str
    headless: bool

    @property
    def places_experts(self) -> bool:
        """Whether workers will want a compiled placement planner."""
        return "placement" in self.config.levels and "--enable-eplb" in self.arguments

    @property
    def idle_levels(self) -> tuple[str, ...]:
        """Levels that are on and can do nothing with these flags."""
        if "placement" not in self.config.levels or self.places_experts:
            return ()
        return () if "--config" in self.arguments else ("placement",)

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "gimbal.vllm_plugin.serve.server", *self.arguments]


def plan_server(
    arguments: Sequence[str],
    *,
    demo: bool = False,
    demo_dir: Path | None = None,
    levels: str | None = None,
    config_file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> ServePlan:
    """Checks everything that can be checked without starting vLLM; makes the demo model.

    Raises InputError for a bad flag, configuration, model, port, vLLM version or machine.
    """
    environment = os.environ if environment is None else environment
    flags = read_flags(arguments)
    config = _configuration(flags, levels, config_file)
    plugins = environment.get("VLLM_PLUGINS")
    if plugins is not None and "gimbal" not in plugins.split(","):
        raise InputError(f"VLLM_PLUGINS={plugins}: vLLM would not load gimbal: add it, or unset it")
    install = checks.installed_vllm()
    check_flags(flags.given)
    if demo:
        flags = _demo_flags(flags, demo_dir)
    elif flags.model is None and not any(w in flags.given for w in ("--config", "--model")):
        raise InputError("no model given: gimbal serve MODEL [vLLM flags], or gimbal serve --demo")
    if flags.model is not None:
        model_config = checks.model_config(flags.model)
        checks.check_experts(flags, model_config)
        checks.check_heads(flags, model_config)
    if not install.cpu:
        checks.check_devices(flags, checks.visible_gpus())
    if not flags.headless and "--uds" not in flags.given:
        checks.check_port(flags.host, flags.port)
    extra = dict(flags.additional_config or {})
    extra["gimbal"] = to_mapping(config)
    host = flags.host if flags.host not in (None, "0.0.0.0", "::") else "127.0.0.1"
    return ServePlan(
        arguments=(*flags.rest, "--additional-config", json.dumps(extra)),
        environment=_environment(flags, install.cpu, demo, environment),
        config=config,
        url=f"http://{host}:{flags.port}/v1",
        model=_served_name(flags),
        headless=flags.headless or "--uds" in flags.given,
    )


def _configuration(flags: VllmFlags, levels: str | None, file: Path | None) -> GimbalConfig:
    sources: list[tuple[str, Mapping[str, Any]]] = []
    if file is not None:
        sources.append((str(file), read_config_file(file)))
    section = (flags.additional_config or {}).get("gimbal")
    if section is not None:
        if not isinstance(section, Mapping):
            raise InputError(f"--additional-config: gimbal: expected an object, got {section!r}")
        sources.append(("--additional-config: gimbal", section))
    if levels is not None:
        sources.append(("--levels", {"levels": parse_levels(levels)}))
    return merge_config(sources)


def _demo_flags(flags: VllmFlags, demo_dir: Path | None) -> VllmFlags:
    """`flags` with the demo's model and every default the command line leaves open."""
    if flags.model is not None and demo_dir is not None:
        raise InputError("--demo-dir makes a demo model, but a model was given as well")
    added: list[str] = []
    for name, value in _DEMO_VALUES:
        if name not in flags.given:
            added += [name, value]
    for switch in _DEMO_SWITCHES:
        if flags.given.isdisjoint((switch, *off_spellings(switch))):
            added.append(switch)
    given = [g for g in flags.given if g.partition(".")[0] == "--eplb-config"]
    if "--eplb-config" not in given:
        set_here = {g.partition(".")[2] for g in given}
        added += [
            word
            for key, value in _DEMO_EPLB.items()
            if key not in set_here
            for word in (f"--eplb-config.{key}", str(value))
        ]
    model = flags.model or str(demo_model(demo_dir))
    words = [*flags.rest, *added] if flags.model else [model, *flags.rest, *added]
    extra = flags.additional_config
    merged = read_flags(words)
    return replace(merged, model=model, additional_config=extra)


def demo_model(folder: Path | None = None) -> Path:
    """The demo model's folder; made when `folder` (default: a cache) does not hold it yet.

    The cache's name carries a digest of sizes and seed and of the code that makes the model, so
    a change of either makes a new one. Raises InputError for a folder that cannot be written, or
    holds something else.
    """
    from gimbal import demo
    from gimbal.demo.manifest import MANIFEST
    from gimbal.demo.model import make_demo_model, require_free
    from gimbal.demo.sizes import DemoSizes

    sizes = DemoSizes()
    if folder is None:
        digest = hashlib.sha256(repr(sizes).encode())
        for source in sorted(Path(demo.__path__[0]).glob("*.py")):
            digest.update(source.read_bytes())
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "gimbal" / f"demo-{digest.hexdigest()[:12]}"
    if (folder / MANIFEST).exists():
        return folder
    require_free(folder)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed: a killed run leaves no half model behind.
    with writing(folder), tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = make_demo_model(Path(scratch) / "model", sizes)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / MANIFEST).exists():
                raise
    return folder


def _environment(
    flags: VllmFlags, cpu: bool, demo: bool, current: Mapping[str, str]
) -> dict[str, str]:
    added: dict[str, str] = {"VLLM_PLUGINS": _plugins()}
    if demo:
        # The demo needs nothing from the network; without these vLLM and transformers try it.
        added |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if cpu:
        bind = bind_workers(usable_cores(), max(1, flags.local_engines), flags.tp * flags.pp)
        added[_BINDING] = bind
        added["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = _ONEDNN_KERNELS
        if _OWN_MEMORY_NODES not in current and current.get(_BINDING) not in _NO_CORES_NAMED:
            added |= MEMORY_FOLLOWS_CORES
        # The quick start does not pin the threads of a worker one by one: nothing lost with one
        # core per worker, left to the user where there are more.
        if "," not in bind:
            # One thread also keeps numpy from starting a pool, which would forbid the fork.
            added |= {"GIMBAL_ZYGOTE": "1", "OMP_NUM_THREADS": "1"} | _torch_openmp()
    return {name: value for name, value in added.items() if name not in current}


def _plugins() -> str:
    """Every vLLM plugin that is installed: vLLM adds HTTP routes only for plugins named here."""
    groups = ("endpoint", "general", "io_processor", "platform", "stat_logger")
    found = (importlib.metadata.entry_points(group=f"vllm.{group}_plugins") for group in groups)
    return ",".join(sorted({point.name for points in found for point in points}))


def _torch_openmp() -> dict[str, str]:
    """Preloads torch's OpenMP library, so that torch and vLLM's kernels share one thread pool.

    vLLM does the same for the processes it spawns; the zygote's forks never pass through there.
    """
    torch = importlib.util.find_spec("torch")
    for folder in (torch.submodule_search_locations or []) if torch else []:
        for library in sorted(Path(folder).glob("lib/libgomp*.so*")):
            return {"LD_PRELOAD": str(library)}
    return {}


def _served_name(flags: VllmFlags) -> str:
    words = list(flags.rest)
    for index, word in enumerate(words):
        name, _, value = word.replace("_", "-").partition("=")
        if name == "--served-model-name":
            return value or words[index + 1]
    return flags.model or "the configured model"
