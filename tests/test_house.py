"""The layout that docs/design.md tells: imports go down, files hold one idea, state has a name."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import loop_lens

PACKAGE = Path(loop_lens.__file__).parent
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
DESIGN = PACKAGE.parent / "docs" / "design.md"

FRONT_DOORS = {"boot", "wrap", "loopify", "train", "patch_sweep", "run_with_hooks", "run_with_cache"}
"""Functions that a user calls with many keywords; everything else has at most twelve parameters."""


def rooms() -> list[str]:
    """The rooms in the order of the table of docs/design.md, the lowest first."""
    rows = re.findall(r"^\| `(\w+)/` \|", DESIGN.read_text(), flags=re.M)
    assert rows, "docs/design.md has no table of rooms"
    return rows


def room(path: Path) -> str | None:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def imported(path: Path) -> set[tuple[str, ...]]:
    """What a file imports from the package, however and wherever, as dotted parts."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            base = tuple(node.module.split("."))
            found |= {(*base, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
    return {parts[1:] for parts in found if parts[0] == "loop_lens" and len(parts) > 1}


def module_of(parts: tuple[str, ...]) -> Path | None:
    """The file that an import reads."""
    for n in range(len(parts), 0, -1):
        base = PACKAGE.joinpath(*parts[:n])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def test_every_room_is_in_the_table() -> None:
    there = {r for r in map(room, FILES) if r is not None}
    assert sorted(there) == sorted(rooms())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    own = room(path)
    if own is None:
        return
    order = rooms()
    up = [
        ".".join(parts)
        for parts in imported(path)
        if parts[0] in order and order.index(parts[0]) > order.index(own)
    ]
    assert not up, f"{path.name} imports from above its room {own!r}: {up}"


def test_there_is_no_circle() -> None:
    arrows = {path: {m for p in imported(path) if (m := module_of(p)) and m != path} for path in FILES}
    # A package's own __init__ imports its files for the user; within the package nobody imports it.
    done: set[Path] = set()

    def visit(path: Path, trail: list[Path]) -> None:
        assert path not in trail, " -> ".join(str(p.relative_to(PACKAGE)) for p in [*trail, path])
        if path in done:
            return
        for target in sorted(arrows.get(path, ())):
            visit(target, [*trail, path])
        done.add(path)

    for path in FILES:
        visit(path, [])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_holds_one_idea(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    assert not re.search(r"__dict__\[[\x22\x27]", text), "storage by __dict__[...]: give it a name"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == "HookedLoopedTransformer":
            assert (node.end_lineno or 0) - node.lineno + 1 <= 350
        if isinstance(node, ast.FunctionDef) and node.name not in FRONT_DOORS:
            a = node.args
            own = bool(a.args) and a.args[0].arg in ("self", "cls")
            n = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs) - own
            assert n <= 12, f"{node.name} has {n} parameters"


def test_no_public_function_is_named_like_a_module() -> None:
    for init in PACKAGE.rglob("__init__.py"):
        name = ".".join(["loop_lens", *init.parent.relative_to(PACKAGE).parts])
        for public in getattr(importlib.import_module(name), "__all__", ()):
            assert not (init.parent / f"{public}.py").exists(), f"{name}.{public}"
            assert not (init.parent / public).is_dir(), f"{name}.{public}"


def test_the_package_prints_nothing_and_has_no_banners() -> None:
    for path in FILES:
        assert not re.search(r"^\s*print\(|^\s*# ---", path.read_text(), flags=re.M), path


def test_what_the_design_names_is_there() -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.py)` `([\w.]+)`", DESIGN.read_text())
    assert len(named) > 10
    for path, name in named:
        thing: object = importlib.import_module(f"loop_lens.{path.removesuffix('.py').replace('/', '.')}")
        for part in name.split("."):
            thing = getattr(thing, part)
