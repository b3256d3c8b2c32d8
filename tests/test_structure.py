"""The shape of the code: no import circles, and nothing written twice."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import defaultdict
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("encoders", "adapters", "mmdlm")
RUN = 10  # equal lines of code in a row that may not stand in two places


def modules() -> dict[str, Path]:
    """Every module of ours by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a module imports anywhere, for types too."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            source = resolve_name(dots + (node.module or ""), package) if dots else node.module
            found |= {
                inner if (inner := f"{source}.{alias.name}") in known else source
                for alias in node.names
            }
    return {target for target in found if target in known and target != name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, directly or not."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            for target in graph[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        reached[start] = seen
    tied = {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in graph
        if name in reached[name]
    }
    return sorted(map(sorted, tied))


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(graph) == [["a", "b", "c"]]


def test_no_modules_import_one_another() -> None:
    known = modules()
    # The public names of the package are read lazily, from above.
    graph = {n: imports(n, p, known) - {"mmdlm"} for n, p in known.items() if n != "mmdlm"}
    assert not circles(graph)


def code_lines(source: str) -> list[tuple[int, str]]:
    """Number and text of the lines of code inside functions.

    Signatures, docstrings, comments, imports and lone brackets are declarations or layout.
    """
    tree = ast.parse(source)
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                inside |= set(range(body[0].lineno, body[-1].end_lineno + 1))
    comments = {
        token.start[0]: token.start[1]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = []
    for number, line in enumerate(source.splitlines(), 1):
        text = line[: comments.get(number, len(line))].strip()
        is_code = number in inside and any(map(str.isalnum, text))
        if is_code and not text.startswith(("import ", "from ")):
            found.append((number, text))
    return found


def repeated(sources: dict[str, str]) -> list[str]:
    """Places that share a run of `RUN` equal lines of code."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, source in sources.items():
        lines = code_lines(source)
        for i in range(len(lines) - RUN + 1):
            run = tuple(text for _, text in lines[i : i + RUN])
            places[run].append(f"{name}:{lines[i][0]}")
    return [" = ".join(where) for where in places.values() if len(where) > 1]


def test_repeated_lines_are_found() -> None:
    body = "\n".join(f"    x{i} = {i}" for i in range(RUN))
    sources = {"a": f"def f():\n{body}\n", "b": f"def g():\n    y = 0  # other\n{body}\n"}
    assert repeated(sources) == ["a:2 = b:3"]
    assert not repeated({"a": sources["a"]})


def test_no_run_of_ten_equal_lines_stands_twice() -> None:
    sources = {n: path.read_text(encoding="utf-8") for n, path in modules().items()}
    assert not repeated(sources)
