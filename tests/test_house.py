"""The house rules that no linter knows: who may import whom, how long a file may be, and what is never done."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("nndefense", "index_build")
SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))

# From the bottom up: a room imports only rooms of lower rows, never one beside it.
FLOORS = (
    ("nndefense.bars", "nndefense.errors"),
    ("nndefense.parts",),
    ("nndefense.files",),
    (
        "nndefense.faces",
        "nndefense.images",
        "nndefense.locks",
        "nndefense.memory",
        "nndefense.modes",
        "nndefense.own_code",
        "nndefense.recipes",
        "nndefense.statistics",
        "nndefense.unwrapping",
        "nndefense.versions",
    ),
    ("nndefense.datasets", "nndefense.attacks", "nndefense.reporting", "nndefense.theory"),
    ("nndefense.models", "nndefense.features"),
    ("nndefense.database",),
    ("nndefense.certificates", "nndefense.defenses", "nndefense.training"),
    ("index_build", "nndefense.evaluation", "nndefense.guard"),
    ("nndefense.pipeline",),
    ("nndefense.comparison", "nndefense.experiments", "nndefense.serving"),
    ("nndefense.cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The face of the package stands outside the rooms, and imports them when they are used.
FACE = ("nndefense/__init__.py", "nndefense/__main__.py")
# These rooms know nothing of the rest of the house, not even of the rooms below.
APART = {"nndefense.attacks", "nndefense.theory"}
FOUNDATION = {floor for row in FLOORS[:4] for floor in row}

LINES = 400
LONGER: dict[str, int] = {}

PUBLIC = (
    "nndefense",
    "nndefense.attacks",
    "nndefense.attacks.retrieval",
    "nndefense.attacks.rp2",
    "nndefense.certificates",
    "nndefense.cli",
    "nndefense.comparison",
    "nndefense.database",
    "nndefense.datasets",
    "nndefense.defenses",
    "nndefense.defenses.quilting",
    "nndefense.defenses.transforms",
    "nndefense.evaluation",
    "nndefense.evaluation.report",
    "nndefense.experiments",
    "nndefense.features",
    "nndefense.guard",
    "nndefense.models",
    "nndefense.pipeline",
    "nndefense.reporting",
    "nndefense.serving",
    "nndefense.serving.cluster",
    "nndefense.serving.demo_attacks",
    "nndefense.serving.http",
    "nndefense.serving.pictures",
    "nndefense.theory",
    "nndefense.training",
    "nndefense.training.objectives",
    "index_build",
)


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[0] if parts[0] == "index_build" else ".".join(parts[:2]) if parts[0] == "nndefense" else None


@functools.cache
def nodes_of(source: str) -> tuple[ast.AST, ...]:
    """All nodes of a source's syntax tree; every file is parsed once for all tests."""
    return tuple(ast.walk(ast.parse(source)))


def imported(source: str) -> set[str]:
    """Every module of the project that a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            # "from nndefense import attacks" imports the room nndefense.attacks.
            rooms = [f"nndefense.{a.name}" for a in node.names if not a.name.startswith("__")]
            found.update([node.module] if node.module != "nndefense" else rooms)
    return {module for module in found if module and module.split(".")[0] in PACKAGES}


def upward(path: Path, source: str) -> list[str]:
    """What a file imports that it must not."""
    own = room_of(name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    assert own in FLOOR, f"{name_of(path)} stands in no room"
    wrong = []
    for module in imported(source):
        room = room_of(module)
        assert room in FLOOR, f"{name_of(path)} imports {module}, which stands in no room"
        allowed = room == own or FLOOR[room] < FLOOR[own]
        if own in APART and room != own:
            allowed = room in FOUNDATION
        if not allowed:
            wrong.append(f"{name_of(path)} imports {module}")
    return wrong


def files_imported(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> modules, of a house of module -> source: every import counts, also within functions and for types."""
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        found: set[str] = set()
        for node in nodes_of(source):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                # A name of a package is a file of it or stands in its __init__.
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                found.update(module if module in sources else node.module for module in inner)
        graph[name] = (found & set(sources)) - {name}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of files of which each reaches every other one by imports (Tarjan 1972), of two files or more."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        open_.append(name)
        for other in sorted(graph[name]):
            if other not in number:
                visit(other)
            if other in open_:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == number[name]:
            at = open_.index(name)
            found.append(sorted(open_[at:]))
            del open_[at:]

    for name in graph:
        if name not in number:
            visit(name)
    return sorted(members for members in found if len(members) > 1)


def public_classes(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Name of a public class -> the modules that define one of that name."""
    found: dict[str, list[str]] = {}
    for name, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(name)
    return found


def forbidden(source: str) -> list[str]:
    """Uses of pickles and of code that is made from text."""
    found = []
    for node in nodes_of(source):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "compile", "__import__", "os.system", "torch.load", "torch.hub.load"):
                found.append(called)
            if any(
                k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
                for k in node.keywords
            ):
                found.append(f"{called}(allow_pickle)")
            if any(k.arg == "shell" for k in node.keywords):
                found.append(f"{called}(shell)")
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found += [
            m for m in modules if m.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
        ]
    return found


def test_there_are_sources() -> None:
    assert len(SOURCES) > 50
    assert {room_of(name_of(p).removesuffix(".py").replace("/", ".")) for p in SOURCES} >= set(FLOOR)


@pytest.mark.parametrize("path", [path for path in SOURCES if name_of(path) not in FACE], ids=name_of)
def test_rooms_import_only_downward(path: Path) -> None:
    assert not upward(path, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("nndefense/attacks/norms.py", "from nndefense.models import Classifier"),
        ("nndefense/attacks/norms.py", "from nndefense import datasets"),
        ("nndefense/models/load.py", "import nndefense.features"),
        ("nndefense/database/rows.py", "def f():\n    from nndefense.defenses import calibrate"),
        ("index_build/reader.py", "from nndefense.evaluation import evaluate"),
        ("nndefense/training/loop.py", "from nndefense.cli import options"),
        ("nndefense/theory/solve.py", "from nndefense import attacks"),
    ],
)
def test_an_upward_import_would_be_seen(file: str, line: str) -> None:
    assert upward(REPOSITORY / file, line)


HOUSE = {
    name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path.read_text(encoding="utf-8")
    for path in SOURCES
}


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(files_imported(HOUSE)) == []


def test_a_circle_would_be_seen() -> None:
    house = {
        "h": "from h import a\nimport os",
        "h.a": "def f():\n    from h.b import g",
        "h.b": "import h.c",
        "h.c": "if TYPE_CHECKING:\n    from h import a, d",
        "h.d": "from h.e import x",
        "h.e": "from h.d import y",
        "h.f": "import h.f",
    }
    assert circles(files_imported(house)) == [["h.a", "h.b", "h.c"], ["h.d", "h.e"]]
    assert circles(files_imported({**house, "h.b": "from h import name"})) == [["h", "h.a", "h.b"], ["h.d", "h.e"]]
    assert circles(files_imported({**house, "h.b": "", "h.e": "import os"})) == []


def test_no_two_public_classes_have_one_name() -> None:
    twice = {name: files for name, files in public_classes(HOUSE).items() if len(files) > 1}
    assert not twice


def test_namesakes_would_be_seen() -> None:
    house = {"a": "class Rows: ...\nclass _Own: ...", "b": "class Rows: ...\nclass _Own: ..."}
    assert public_classes(house) == {"Rows": ["a", "b"]}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGER.get(name_of(path), LINES)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_pickle_and_no_code_from_text(path: Path) -> None:
    assert not forbidden(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "eval('1')",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_a_pickle_would_be_seen(line: str) -> None:
    assert forbidden(line)


def test_harmless_code_is_not_forbidden() -> None:
    assert not forbidden("model.eval()\nre.compile('x')\nimportlib.import_module('a')\nnp.load(p, allow_pickle=False)")


HEAVY = ("torch", "torchvision", "numpy", "h5py", "faiss", "sklearn", "scipy", "PIL", "safetensors", "tqdm")


def loaded_by(code: str) -> dict[str, object]:
    """Run code in a fresh interpreter: which heavy modules it loaded, how many threads it left, and its seconds."""
    program = f"""
import json, os, sys, threading, time
begun = time.perf_counter()
try:
    {code}
except SystemExit as end:
    assert not end.code, end.code
seconds = time.perf_counter() - begun
tasks = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()
found = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps({{"heavy": found, "threads": tasks, "seconds": seconds}}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    found: dict[str, object] = json.loads(done.stderr.splitlines()[-1])
    return found


@pytest.mark.parametrize("words", [["--help"], ["demo", "--help"], ["index", "build", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    found = loaded_by(f"sys.argv = {['nndefense', *words]!r}; from nndefense.cli import main; main()")
    assert found["heavy"] == []
    assert found["threads"] == 1


def test_importing_the_package_loads_nothing_and_starts_nothing() -> None:
    found = loaded_by("import nndefense, nndefense.errors; nndefense.__version__; dir(nndefense)")
    assert found["heavy"] == []
    assert found["threads"] == 1
    # And the probe does see what is loaded.
    assert "numpy" in str(loaded_by("import nndefense; nndefense.open_dataset")["heavy"])


def test_help_is_instant() -> None:
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nndefense", "--help"], capture_output=True, check=True, cwd=REPOSITORY)
        best = min(best, time.perf_counter() - begun)
    # A third of a second on an idle machine; the rest is for busy ones.
    assert best < 2


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_exist_and_are_described(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    assert module.__all__
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            # A dataclass without a docstring gets its signature for one.
            described = value.__doc__ and not value.__doc__.startswith(f"{name}(")
            assert described, f"{package}.{name} has no docstring"
            for member, found in vars(value).items() if inspect.isclass(value) else ():
                if inspect.isfunction(found) and not member.startswith("_"):
                    assert found.__doc__, f"{package}.{name}.{member} has no docstring"


def undescribed(function: ast.FunctionDef, of_class: str = "") -> list[str]:
    """What a public function's docstring leaves out: errors that it raises itself, and arguments.

    Args:
        function: as parsed.
        of_class: the docstring of its class, which may say it.
    """
    own = ast.get_docstring(function) or ""
    said = own + of_class
    functions = [f for f in ast.walk(function) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inner = {x for f in functions if f is not function for x in ast.walk(f)}
    raises = [node.exc for node in set(ast.walk(function)) - inner if isinstance(node, ast.Raise)]
    called = {x.func.id for x in raises if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)}
    # An error that a function makes is not known by its name here.
    names = {name for name in called if name[0].isupper()}
    # "the errors are as for" another function says where to read them; the base class stands for every kind.
    if re.search(r"\berrors\b|NNDefenseError", said):
        names = set()
    # Likewise arguments are "as for" another function, or those of what makes objects of a class.
    elsewhere = r"\b[Aa]s for\b"
    if function.name == "__init__":
        elsewhere += r"|made by :|with :meth:`(open|create)|:meth:`open`"
    if "Args:" in own or not re.search(elsewhere, said):
        a = function.args
        given = (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg)))
        names |= {x.arg for x in given} - {"self", "cls"}
    return sorted(name for name in names if not re.search(rf"\b{name}\b", said))


def public_functions() -> list[tuple[str, ast.FunctionDef, str]]:
    """Module and name, syntax, and class's docstring of every public function, and method of a public class."""
    found = {}
    for package in PUBLIC:
        module = importlib.import_module(package)
        for value in (getattr(module, name) for name in module.__all__):
            if not (inspect.isclass(value) or inspect.isfunction(value)) or value.__module__ not in HOUSE:
                continue
            home = f"{value.__module__}.{value.__name__}"
            for node in ast.parse(HOUSE[value.__module__]).body if home not in found else ():
                if isinstance(node, ast.FunctionDef) and node.name == value.__name__:
                    found[home] = [(home, node, "")]
                elif isinstance(node, ast.ClassDef) and node.name == value.__name__:
                    methods = [x for x in node.body if isinstance(x, ast.FunctionDef)]
                    shown = [x for x in methods if x.name == "__init__" or not x.name.startswith("_")]
                    found[home] = [(f"{home}.{x.name}", x, ast.get_docstring(node) or "") for x in shown]
    return [entry for entries in found.values() for entry in entries]


# What every objective is given is said once, by nndefense.training.Objective.
OF_OBJECTIVES = {"model", "batch", "attack"}


def test_public_docstrings_name_their_errors_and_all_arguments() -> None:
    functions = public_functions()
    assert len(functions) > 500
    left_out = {name: undescribed(function, said) for name, function, said in functions}
    for name in left_out:
        if name.startswith("nndefense.training.objectives."):
            left_out[name] = [argument for argument in left_out[name] if argument not in OF_OBJECTIVES]
    assert {name: missing for name, missing in left_out.items() if missing} == {}


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ('def f(x):\n    """Do x."""\n    raise InputError("x")', ["InputError"]),
        ('def f(x):\n    """Do x.\n\n    Raises:\n        InputError: x.\n    """\n    raise InputError("x")', []),
        ('def f(x):\n    """Do; errors as for g."""\n    raise InputError("x")', []),
        ('def f(x, y):\n    """Do ``y``."""', ["x"]),
        ('def f(x, *, y, **z):\n    """Do.\n\n    Args:\n        x: this.\n    """', ["y", "z"]),
        ('def f(x):\n    """Do x."""\n    def g():\n        raise InputError("x")', []),
    ],
)
def test_what_a_docstring_leaves_out_is_seen(source: str, missing: list[str]) -> None:
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert undescribed(function) == missing


def test_every_package_is_in_the_list_of_public_ones() -> None:
    folders = {name_of(path.parent).replace("/", ".") for path in SOURCES if path.name == "__init__.py"}
    # The architectures are reached through nndefense.models.
    assert folders - {"nndefense.models.architectures"} == set(PUBLIC)
