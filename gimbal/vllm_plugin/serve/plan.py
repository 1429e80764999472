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

from gimbal.core.caches import COMPILED, compiled_code, is_writable, private_folder, user_cache
from gimbal.core.config import GimbalConfig
from gimbal.core.config_sources import merge_config, parse_levels, read_config_file, to_mapping
from gimbal.core.errors import InputError
from gimbal.core.files import writing
from gimbal.vllm_plugin.bridge import rust_front_end
from gimbal.vllm_plugin.cpu_backend.binding import bind_workers, usable_cores
from gimbal.vllm_plugin.serve import checks
from gimbal.vllm_plugin.serve.address import Address, address_of
from gimbal.vllm_plugin.serve.flags import VllmFlags, read_flags
from gimbal.vllm_plugin.versions import MEMORY_FOLLOWS_CORES

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
        address: where the server answers; None where nobody here can ask it over HTTP (headless,
            a Unix socket, gRPC).
        model: name to ask for in requests.
        headless: engines only, for a head on another host.
        local_engines: engines that start here.
        eplb: vLLM's expert parallel load balancing is on.
        dispatches: there is something for a front end of Gimbal's to choose between.
        warnings: what is worth saying before the start.
        page: the server answers below ``/gimbal``.
        head: address of a headless node's head; None where it is not said, or there is none.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]
    config: GimbalConfig
    address: Address | None
    model: str
    headless: bool = False
    local_engines: int = 1
    page: bool = True
    eplb: bool = False
    dispatches: bool = True
    warnings: tuple[str, ...] = ()
    head: str | None = None

    @property
    def places_experts(self) -> bool:
        """Whether workers will want a compiled placement planner."""
        return "placement" in self.config.levels and self.eplb

    @property
    def idle_levels(self) -> tuple[str, ...]:
        """Levels that are on and can do nothing with these flags."""
        can = {"dispatch": self.dispatches, "placement": self.eplb}
        return tuple(level for level in self.config.levels if not can.get(level, True))

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
    install = checks.installed_vllm()
    read = _read_for_demo if demo else read_flags
    flags = read(arguments, install.version)
    config = _configuration(flags, levels, config_file)
    plugins = environment.get("VLLM_PLUGINS")
    if plugins is not None and "gimbal" not in plugins.split(","):
        raise InputError(f"VLLM_PLUGINS={plugins}: vLLM would not load gimbal: add it, or unset it")
    if demo:
        flags = _demo_flags(flags, install.version, demo_dir)
    elif flags.model is None:
        raise InputError("no model given: gimbal serve MODEL [vLLM flags], or gimbal serve --demo")
    assert flags.model is not None
    warnings = checks.check_model(flags, install.version)
    checks.check_engines(flags, config.levels)
    checks.check_headless(flags)
    if not install.cpu:
        checks.check_devices(flags, checks.visible_gpus())
    checks.check_address(flags)
    rust = rust_front_end(environment)
    added, said = checks.few_api_servers(flags, config.levels, rust)
    warnings += said
    extra = dict(flags.additional_config or {})
    extra["gimbal"] = to_mapping(config)
    plan = ServePlan(
        arguments=(*flags.rest, *added, "--additional-config", json.dumps(extra)),
        environment=_environment(flags, install.cpu, demo, environment),
        config=config,
        address=address_of(flags),
        model=flags.served_name or flags.model,
        headless=flags.headless,
        head=flags.dp_address if flags.headless else None,
        local_engines=flags.local_engines,
        page=bool(config.levels) and not rust,
        eplb=flags.eplb,
        dispatches=checks.dispatches(flags, rust),
    )
    if "placement" in plan.idle_levels:  # of dispatch the server's own log tells, with the reason
        warnings += ("level placement stays idle: it needs --enable-eplb (and -ep)",)
    return _keeping_compiled_code(replace(plan, warnings=warnings))


def _keeping_compiled_code(plan: ServePlan) -> ServePlan:
    """`plan` whose processes find each other's compiled code, though no folder lasts."""
    folder, lasts = compiled_code()
    if lasts or not plan.config.levels:
        return plan
    said = f"neither the package's folder nor a cache of yours can be written: {COMPILED} names one"
    if folder is None:
        return replace(
            plan, warnings=(*plan.warnings, f"{said}; until then every process compiles")
        )
    return replace(
        plan,
        environment={COMPILED: str(folder)} | plan.environment,
        warnings=(*plan.warnings, f"{said} that lasts; compiled code goes to {folder}"),
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


def _read_for_demo(arguments: Sequence[str], version: str) -> VllmFlags:
    """`read_flags` where no model need be named: beside ``--config`` vLLM wants one."""
    try:
        return read_flags(arguments, version)
    except InputError:
        flags = read_flags([DEMO_NAME, *arguments], version)
        return replace(flags, model=None, rest=flags.rest[1:])


def _demo_flags(flags: VllmFlags, version: str, demo_dir: Path | None) -> VllmFlags:
    """`flags` with the demo's model and every default the command line leaves open."""
    if flags.model is not None and demo_dir is not None:
        raise InputError("--demo-dir makes a demo model, but a model was given as well")
    added: list[str] = []
    for name, value in _DEMO_VALUES:
        on_the_head = flags.headless and _name(name) == "api_server_count"
        if _name(name) not in flags.given and not on_the_head:
            added += [name, value]
    added += [switch for switch in _DEMO_SWITCHES if _name(switch) not in flags.given]
    # Dotted keys are put together; a whole option would be replaced by them.
    if "eplb_config" not in flags.given or any(map(_is_dotted_eplb, flags.rest)):
        added += [
            word
            for key, value in _DEMO_EPLB.items()
            if key not in (flags.eplb_config or {})
            for word in (f"--eplb-config.{key}", str(value))
        ]
    words = [*flags.rest, *added]
    if flags.model is None:
        words = [str(demo_model(demo_dir)), *words]
    return replace(read_flags(words, version), additional_config=flags.additional_config)


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _is_dotted_eplb(word: str) -> bool:
    return _name(word).startswith("eplb_config.")


def demo_model(folder: Path | None = None) -> Path:
    """The demo model's folder; made when `folder` (default: a cache) does not hold it yet.

    Where the user's cache cannot be written it lies among temporary files.

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
        name = f"demo-{digest.hexdigest()[:12]}"
        cache = user_cache()
        base = cache / "gimbal" if cache else None
        if base is None or not ((base / name / MANIFEST).exists() or is_writable(base)):
            base = private_folder()
        if base is None:
            raise InputError("no folder can be written for the demo model: --demo-dir FOLDER")
        folder = base / name
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
        bind = bind_workers(usable_cores(), max(1, flags.local_engines), flags.ranks_per_engine)
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
