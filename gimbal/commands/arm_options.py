"""The options that ``gimbal bench`` and ``gimbal simulate`` share: which arms, configured how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gimbal.commands.output import echo_json

if TYPE_CHECKING:
    from gimbal.report.arms import Arm

Function = TypeVar("Function", bound=Callable[..., Any])

_OPTIONS = [
    click.option(
        "--arms",
        "arm_names",
        help="comma-separated arms, see --list (default: vllm,gimbal, or vllm and those of the "
        "arms file)",
    ),
    click.option("--arms-file", type=click.Path(path_type=Path), help="YAML file with more arms"),
    click.option(
        "--gimbal-config",
        type=click.Path(path_type=Path),
        help="configuration under every arm's own; the arm `gimbal` is this file",
    ),
    click.option("--levels", help="levels of the arm `gimbal`, or all, or none"),
    click.option("--list", "list_names", is_flag=True, help="list what can be named, and stop"),
]
_NAMES = ("arm_names", "arms_file", "gimbal_config", "levels")


def arm_options(function: Function) -> Function:
    """Adds the shared options to a command; `read_arm_options` takes them back."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def arms_given(values: dict[str, Any]) -> bool:
    """Whether the command line says anything about arms."""
    return any(values[name] is not None for name in _NAMES)


def read_arm_options(values: dict[str, Any]) -> list[Arm]:
    """The arms that were asked for; raises InputError."""
    from gimbal.report.arms_file import select_arms

    names = values["arm_names"]
    return select_arms(
        None if names is None else [name.strip() for name in names.split(",")],
        _levels(values),
        values["arms_file"],
        values["gimbal_config"],
    )


def list_names(values: dict[str, Any], **others: Iterable[str]) -> None:
    """Prints every scenario and arm, those of the arms file too, each with its description.

    Args:
        others: names of other kinds, which stand first.
    """
    from gimbal.report.arms_file import known_arms, read_arms
    from gimbal.workloads.scenario import load_scenario, scenario_names

    scenarios = {name: load_scenario(name).description for name in scenario_names()}
    file = values["arms_file"]
    known = known_arms(
        {} if file is None else read_arms(file), _levels(values), values["gimbal_config"]
    )
    if values["as_json"]:
        arms = {
            arm.name: {"description": arm.description, "simulated": arm.simulated is not None}
            for arm in known.values()
        }
        echo_json({**others, "scenarios": scenarios, "arms": arms})
        return
    for kind, names in others.items():
        click.echo(f"{kind}: {', '.join(names)}")
    click.echo("scenarios, for --trace:")
    for name, description in scenarios.items():
        click.echo(f"  {name:{max(map(len, scenarios))}}  {description}")
    width = max(map(len, known))
    click.echo("arms (* in `gimbal simulate` only):")
    for arm in known.values():
        mark = "*" if arm.simulated is not None else " "
        click.echo(f" {mark}{arm.name:{width}}  {arm.description}".rstrip())


def _levels(values: dict[str, Any]) -> list[str] | None:
    from gimbal.core.config_sources import parse_levels

    return None if values["levels"] is None else parse_levels(values["levels"])
