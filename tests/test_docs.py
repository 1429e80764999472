"""The documentation is true of this tree: links, paths and modules exist, and prose is wrapped."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "reproduction").rglob("*.md"),
    ]
)
WIDTH = 100
ROOTS = ("gimbal", "tests", "benchmarks", "examples", "scripts", "docs", "reproduction")
ENTRY_POINT_GROUPS = ("gimbal.dispatch", "gimbal.ordering", "gimbal.placer")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)", re.DOTALL)
CODE = re.compile(r"`([^`]+)`")
PATH = re.compile(rf"(?:{'|'.join(ROOTS)})/[\w./*-]*")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
MODULE = re.compile(r"(?:gimbal|reproduction)(?:\.\w+)+")

page_of_docs = pytest.mark.parametrize(
    "page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES]
)


def lines_outside_code(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of every line that is not inside a fence."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def prose(page: Path) -> str:
    """The text of `page` without its fenced code."""
    text = page.read_text(encoding="utf-8")
    return "\n".join(line for _, line in lines_outside_code(text))


def anchors(text: str) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    found = set()
    for _, line in lines_outside_code(text):
        if heading := re.match(r"#+ (.*)", line):
            kept = re.sub(r"[^\w\- ]", "", heading[1].lower())
            found.add(kept.strip().replace(" ", "-"))
    return found


def broken_links(page: Path) -> list[str]:
    """Relative links of `page` that lead to no file, or to no heading of it."""
    broken = []
    for link in LINK.findall(CODE.sub("", prose(page))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        known = target == page or (target.exists() and target.is_relative_to(ROOT))
        if not known or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def missing_paths(page: Path) -> list[str]:
    """Paths in backticks, from the root of the tree, that do not exist."""
    return [
        code
        for code in CODE.findall(prose(page))
        if PATH.fullmatch(code) and not any(ROOT.glob(code.rstrip("/")))
    ]


def module_exists(name: str) -> bool:
    """Whether `name` is a module, or something that a module of this tree defines."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:length])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.exists():
                names, source = parts[length:], file.read_text(encoding="utf-8")
                return all(re.search(rf"\b{part}\b", source) for part in names)
    return False


def missing_modules(page: Path) -> list[str]:
    """Dotted names below `gimbal` or `reproduction` in backticks that nothing defines."""
    return [
        name
        for code in CODE.findall(prose(page))
        for name in re.findall(rf"(?:python -m )?(?<![\w./-])({MODULE.pattern})(?![\w/(])", code)
        if name not in ENTRY_POINT_GROUPS and not module_exists(name)
    ]


def missing_tests(page: Path) -> list[str]:
    """``tests/file.py::test`` in backticks that is no test of this tree."""
    return [
        code
        for code in CODE.findall(prose(page))
        if (named := TEST.fullmatch(code)) and not defines_test(ROOT / named[1], named[2])
    ]


def defines_test(file: Path, name: str) -> bool:
    if not file.exists():
        return False
    return bool(re.search(rf"^(?:async )?def {name}\(", file.read_text("utf-8"), re.MULTILINE))


def long_lines(page: Path) -> list[str]:
    """Lines over `WIDTH`; tables and lines that are one link cannot be wrapped."""
    return [
        f"{number}: {line}"
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDTH and not line.startswith("|") and not LINK.fullmatch(line.strip(" -.*"))
    ]


@page_of_docs
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@page_of_docs
def test_paths_exist(page: Path) -> None:
    assert missing_paths(page) == []


@page_of_docs
def test_modules_exist(page: Path) -> None:
    assert missing_modules(page) == []


@page_of_docs
def test_tests_exist(page: Path) -> None:
    assert missing_tests(page) == []


def test_every_feature_names_a_test_or_says_that_it_was_read() -> None:
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(table) > 30
    for row in table:
        *_, does, _, shown_by = (cell.strip() for cell in row.strip("|").split("|"))
        assert does in ("acts", "in part", "aside"), row
        assert shown_by == "read only" or TEST.search(shown_by), row


@page_of_docs
def test_prose_is_wrapped(page: Path) -> None:
    assert long_lines(page) == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists():
                waiting.append(target)
    assert set(PAGES) - reached == set()


def test_extras_that_pages_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {
        extra
        for page in PAGES
        for extra in re.findall(r"extra `(\w+)`", page.read_text(encoding="utf-8"))
    }
    assert named <= set(extras["optional-dependencies"])


def test_make_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for page in PAGES
        for target in re.findall(
            r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert named <= targets


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n[gone](gone.md) [no heading](#nowhere) [web](https://a.org) [here](#page)\n"
        "`gimbal/gone.py` `gimbal/cli.py` `gimbal/sim/*` `gimbal.gone.thing` `gimbal.cli.main`\n"
        "`gimbal.cli.no_such_name` `gimbal.placer` `tests/test_docs.py::test_paths_exist`\n"
        "`tests/test_docs.py::test_gone` `tests/gone.py::test_paths_exist`\n"
        f"| {'x' * WIDTH} |\n{'x' * (WIDTH + 1)}\n```\n[not a link](gone.md)\n```\n"
    )
    assert broken_links(page) == ["gone.md", "#nowhere"]
    assert missing_paths(page) == ["gimbal/gone.py"]
    assert missing_modules(page) == ["gimbal.gone.thing", "gimbal.cli.no_such_name"]
    assert missing_tests(page) == [
        "tests/test_docs.py::test_gone",
        "tests/gone.py::test_paths_exist",
    ]
    assert long_lines(page) == [f"8: {'x' * (WIDTH + 1)}"]
