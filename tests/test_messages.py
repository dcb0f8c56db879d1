"""No message, help text or page names an option that does not exist: all texts of the code and all pages are walked."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from inspect import unwrap
from pathlib import Path
from typing import Any

import typer

import nndefense
from nndefense.attacks import registry
from nndefense.cli.app import _COMMANDS, build
from nndefense.cli.declare import Group

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "nndefense").rglob("*.py")), *sorted((ROOT / "index_build").rglob("*.py"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# Options of other programs; pages also hold those of the tools that a reader is told to run.
FOREIGN = {"--sparse": "GNU tar's"}


def options_of(found: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, set[str]]]:
    """Every command, and its options; a group has those of its commands."""
    own = {flag for option in found.params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
    for name, command in getattr(found, "commands", {}).items():
        for deeper, options in options_of(command, (*path, name)):
            own |= options
            yield deeper, options
    yield " ".join(path), own


COMMANDS = dict(options_of(typer.main.get_command(build())))
EVERY = COMMANDS[""]
FUNCTIONS = [
    (function, f"{command.name} {name}") if isinstance(command, Group) else (command, command.__name__)
    for commands in _COMMANDS.values()
    for command in commands
    for name, function, _ in (command.commands if isinstance(command, Group) else [("", command, "")])
]


def texts(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """The function, the line and the text of every literal that is no docstring; f-strings with {} for their values."""
    passed: set[int] = set()

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, int, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                passed.add(id(first.value))
            function = getattr(node, "name", "") if function == "" else function
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield function, node.lineno, "".join(map(str, parts))
            passed.update(map(id, node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in passed:
            yield function, node.lineno, node.value
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    yield from walk(tree, "")


def wrong(text: str, options: set[str]) -> list[str]:
    """The options that a text names and that are not among these, nor among those of a command that it names, too.

    ``var(--rule)`` and ``--rule:`` are CSS.
    """
    known = set(options)
    for name in COMMANDS:
        if name and f"nndefense {name}" in text:
            known |= COMMANDS[name]
    return [
        found[0]
        for found in OPTION.finditer(text)
        if found[0] not in known
        and text[found.start() - 4 : found.start()] != "var("
        and not text.startswith(":", found.end())
        and found[0] not in FOREIGN
    ]


def of_file(path: Path, function: str) -> set[str]:
    """The options that a text may name: in a command's own function its options, in its file those of the file's."""
    if path.parent.name != "cli" or path.name in ("options.py", "declare.py", "app.py", "__init__.py"):
        return EVERY
    here = [(f, name) for f, name in FUNCTIONS if Path(unwrap(f).__code__.co_filename) == path]
    own = [name for f, name in here if f.__name__ == function] or [name for _, name in here]
    return set().union(*(COMMANDS[name.replace("_", "-")] for name in own)) if own else EVERY


def test_options_in_texts_exist() -> None:
    css = {
        name for sheet in (ROOT / "nndefense" / "reporting").glob("*.css") for name in OPTION.findall(sheet.read_text())
    }
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in SOURCES
        for function, line, text in texts(ast.parse(path.read_text(encoding="utf-8")))
        if wrong(text, of_file(path, function) | (css if path.parent.name in ("reporting", "report") else set()))
    ]
    assert not found


def test_a_proof_names_options_of_every_command_that_asks_for_one() -> None:
    shared = COMMANDS["certify"] & COMMANDS["evaluate"]
    files = [*sorted((ROOT / "nndefense" / "certificates").glob("*.py"))]
    files += [ROOT / "nndefense" / "attacks" / "retrieval" / name for name in ("exact.py", "affine.py")]
    found = [
        f"{path.name}:{line}: {text}"
        for path in files
        for _, line, text in texts(ast.parse(path.read_text(encoding="utf-8")))
        if wrong(text, shared)
    ]
    assert not found


def test_options_made_of_names_exist() -> None:
    # registry says --{effort}, whose text no walk sees.
    for attack in map(registry.get, registry.names()):
        for command in ("evaluate", "attack", "demo", "calibrate"):
            assert f"--{attack.effort or 'steps'}" in COMMANDS[command]
        assert attack.effort in ("", "steps", "queries", None)


# A command of a page ends where the next begins: at the end of its line, of its ticks, or of a shell's part.
LINE = re.compile(r"(?<![\w./-])nndefense ((?:[a-z][\w-]* ?)+)((?:[^\n`|;&]|\\\n)*)")


def test_command_lines_of_pages_exist() -> None:
    lines = 0
    for page in PAGES:
        for found in LINE.finditer(page.read_text(encoding="utf-8").replace("\\\n", " ")):
            words = found[1].split()
            names = [" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in COMMANDS]
            if names:
                assert not wrong(found[2], COMMANDS[names[0]]), f"{page}: {found[0]}"
                lines += "--" in found[2]
    assert lines > 50


def test_wrong_options_would_be_seen() -> None:
    tree = ast.parse(
        'def f(x):\n    """Of --nothing."""\n    raise E(f"{x} is wrong: give --tset, "\n            "or --out")'
    )
    assert [(line, wrong(text, EVERY)) for _, line, text in texts(tree)] == [(3, ["--tset"])]
    assert wrong("give --headline", COMMANDS["train"]) == ["--headline"]
    assert wrong("nndefense evaluate takes --headline", COMMANDS["train"]) == []
    assert wrong("var(--rule) --lo: 3; --pca", EVERY) == []
    assert {"pseudo-label write", "index build", "evaluate"} <= COMMANDS.keys()
    cli = Path(nndefense.__file__).parent / "cli"
    assert "--headline" not in of_file(cli / "train.py", "_weight")
    assert "--recall-k" in of_file(cli / "index.py", "build")
    assert "--recall-k" not in of_file(cli / "index.py", "merge")
