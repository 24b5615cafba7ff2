"""The structure of the package: layers, circular imports, lengths, documentation, private names, repetition, language.

``pytest -rP tests/test_architecture.py`` prints the count of each.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from phrases import PHRASES, left_phrases

from safervlm.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "safervlm").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])

# Lower first. A package may import from its own layer where that makes no circle.
LAYERS = (
    (
        "addresses",
        "compat",
        "errors",
        "failures",
        "finite",
        "hashing",
        "legacy",
        "limits",
        "plugins",
        "protocol",
        "provenance",
        "ranges",
        "recipes",
        "run_folder",
        "schedules",
    ),
    ("io", "statistics"),
    ("records",),
    ("unfinished",),
    ("run", "ending", "manifest", "progress_lines", "vlm", "data"),
    ("judging", "labelling"),
    ("objectives", "measure", "results"),
    ("reports",),
    ("pictograms", "cli", "api", "__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
LONGEST = 450  # lines of a module
HOOKS = {
    *("setup", "teardown", "prepare_data", "state_dict", "load_state_dict", "forward", "configure_optimizers"),
    *("training_step", "validation_step", "predict_step", "transfer_batch_to_device"),
    *("train_dataloader", "val_dataloader", "predict_dataloader"),
}
# Private names of other packages, where there is no public way: module -> names.
EXCUSED = {
    "safervlm.io.signals": {"_exit"},  # the documented way to end without cleaning up
    "safervlm.vlm.remote.cogvlm": {"_compute_inv_freq"},  # of the model's own code
    "safervlm.vlm.remote.xcomposer": {"_init_rope"},  # of the model's own code
    "safervlm.vlm.lora": {"_active_adapter"},  # PEFT's public way is not right inside a recomputation
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(name: str) -> set[str]:
    """The modules that a module imports, inside functions, too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {str(node.module)}
    return found


GRAPH = {name: imported(name) & MODULES.keys() for name in MODULES}


def test_imports_point_down() -> None:
    upward = []
    for name, path in MODULES.items():
        if name == "callbacks" or name.startswith("callbacks."):
            upward += [f"{name} -> {other}" for other in GRAPH[name] if other.startswith("safervlm.cli")]
            continue
        place = path.relative_to(ROOT / "safervlm").parts[0].removesuffix(".py")
        assert place in LEVEL, f"{name} is in no layer"
        for other in imported(name):
            top, *rest = other.split(".")
            if top in ("callbacks", "tests", "scripts") or (
                top == "safervlm" and rest and LEVEL.get(rest[0], 0) > LEVEL[place]
            ):
                upward.append(f"{name} -> {other}")
    print(f"upward imports: {len(upward)}")
    assert not upward


def circles() -> Iterator[list[str]]:
    """Groups of modules that import each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(GRAPH[name]):
            if other not in index:
                yield from visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                yield group

    for name in GRAPH:
        if name not in index:
            yield from visit(name)


def test_no_circular_imports() -> None:
    found = list(circles())
    print(f"circles: {len(found)}")
    assert not found


def test_no_module_exceeds_the_line_limit() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    long = {name: count for name, count in lines.items() if count > LONGEST}
    print(f"modules over {LONGEST} lines: {len(long)}")
    assert not long


def test_no_name_is_defined_twice() -> None:
    places = defaultdict(list)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, FUNCTION | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    twice = {name: modules for name, modules in places.items() if len(modules) > 1}
    print(f"names defined twice: {len(twice)}")
    assert not twice


def undocumented() -> Iterator[str]:
    """Public functions and methods with undocumented arguments."""

    def look(body: list[ast.stmt], name: str, in_class: bool) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from look(node.body, f"{name}.{node.name}", True)
            if not isinstance(node, FUNCTION) or node.name.startswith("_"):
                continue
            if in_class and (node.name.startswith("on_") or node.name in HOOKS):
                continue
            marks = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
            if marks & {"override", "overload", "setter"}:
                continue
            given = node.args
            arguments = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            arguments = [each for each in arguments if each not in ("self", "cls")]
            arguments += [each.arg for each in (given.vararg, given.kwarg) if each]
            if arguments and "Args:" not in (ast.get_docstring(node) or ""):
                yield f"{name}.{node.name}"

    for name, tree in TREES.items():
        yield from look(tree.body, name, False)


def test_arguments_are_documented() -> None:
    missing = list(undocumented())
    print(f"public functions with arguments but without Args: {len(missing)}")
    assert not missing


def without_raises() -> Iterator[str]:
    """Public functions and methods that raise an exception in their own body and don't document any.

    A caught exception that is raised again does not count, nor do exceptions of functions that are called.
    """

    def body(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
        for node in nodes:
            yield node
            if not isinstance(node, FUNCTION | ast.ClassDef | ast.Lambda):
                yield from body(list(ast.iter_child_nodes(node)))  # type: ignore[arg-type]

    def look(nodes: list[ast.stmt], name: str) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from look(node.body, f"{name}.{node.name}")
            if not isinstance(node, FUNCTION) or node.name.startswith("_"):
                continue
            inside = list(body(node.body))
            caught = {each.name for each in inside if isinstance(each, ast.ExceptHandler)}
            raised = [each.exc for each in inside if isinstance(each, ast.Raise) and each.exc is not None]
            raised = [each for each in raised if not (isinstance(each, ast.Name) and each.id in caught)]
            if raised and "Raises:" not in (ast.get_docstring(node) or ""):
                yield f"{name}.{node.name}"

    for name, tree in TREES.items():
        yield from look(tree.body, name)


def test_exceptions_are_documented() -> None:
    missing = list(without_raises())
    print(f"public functions that raise but without Raises: {len(missing)}")
    assert not missing


def code_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of code with their numbers, without comments, docstrings, imports and signatures."""
    text = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= {*range(node.lineno, (node.end_lineno or 0) + 1)}
        elif isinstance(node, FUNCTION):
            left_out |= {*range(node.lineno, node.body[0].lineno)}
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            left_out |= {*range(node.lineno, (node.end_lineno or 0) + 1)}
    stripped = [line.split("  #")[0].strip() for line in text.splitlines()]
    return [
        (number, line)
        for number, line in enumerate(stripped, 1)
        if line and not line.startswith("#") and number not in left_out
    ]


def test_no_code_is_repeated() -> None:
    """No six lines of code occur in two modules: what pylint's R0801 reports, which takes minutes to find it."""
    seen: dict[tuple[str, ...], str] = {}
    repeated = []
    for path in SOURCES:
        lines = code_lines(path)
        for start in range(len(lines) - 5):
            block = tuple(line for _, line in lines[start : start + 6])
            if sum(len(line) > 3 for line in block) < 4:  # closing brackets
                continue
            first = seen.setdefault(block, f"{path.relative_to(ROOT)}:{lines[start][0]}")
            if not first.startswith(f"{path.relative_to(ROOT)}:"):
                repeated.append(f"{first} and {path.relative_to(ROOT)}:{lines[start][0]}")
    print(f"repeated blocks of six lines: {len(repeated)}")
    assert not repeated, "\n".join(repeated)


def names_of_run_files() -> Iterator[str]:
    """Paths that are made with the name of a file or folder of a run, outside the module that defines these names."""
    properties = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    defined = {getattr(RunFolder(""), name).name for name in properties}
    for name, tree in TREES.items():
        if name == "safervlm.run_folder" or name.startswith("safervlm.pictograms"):  # a world is not a run
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
                if node.right.value in defined:
                    yield f"{name}:{node.lineno}: {node.right.value}"
            elif isinstance(node, ast.Constant) and node.value in defined and "." in str(node.value):
                yield f"{name}:{node.lineno}: {node.value}"


def test_run_file_names_are_defined_in_one_module() -> None:
    found = sorted(set(names_of_run_files()))
    print(f"names of a run's files outside their module: {len(found)}")
    assert not found


def private_names() -> Iterator[str]:
    """Private modules and attributes of other packages, outside the places that may have them."""
    for name, tree in TREES.items():
        if name in ("safervlm.compat", "safervlm.vlm.compat"):
            continue
        own = {node.name for node in ast.walk(tree) if isinstance(node, FUNCTION | ast.ClassDef)}
        own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_own(node.value)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not str(node.module).startswith(("safervlm", "callbacks")):
                parts = {*str(node.module).split("."), *(alias.name for alias in node.names)} - {"__future__"}
                if any(part.startswith("_") for part in parts) and not parts & EXCUSED.get(name, set()):
                    yield f"{name}: {node.module}"
            if (
                isinstance(node, ast.Attribute)
                and re.match(r"_[a-z]", node.attr)
                and not is_own(node.value)
                and node.attr not in own | EXCUSED.get(name, set())
            ):
                yield f"{name}: {ast.unparse(node)}"


def is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_private_names_are_not_imported_by_other_modules() -> None:
    found = sorted(set(private_names()))
    print(f"private imports outside the excused places: {len(found)}")
    assert not found


def test_no_replaced_phrase_is_left() -> None:
    found = list(left_phrases())
    print(f"of the {len(PHRASES)} replaced phrases, left: {len(found)}")
    assert len(PHRASES) == 44
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", sorted((ROOT / "safervlm" / "objectives").glob("*.py")), ids=lambda path: path.stem)
def test_each_objective_module_is_shorter_than_350_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 350
