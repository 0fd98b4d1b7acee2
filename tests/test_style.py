"""What keeps the sources readable: short lines, short functions, and imports that only point downwards."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {".py", ".cu", ".cuh", ".h", ".cpp", ".sh"}
LINE, FUNCTION, KERNEL = 120, 80, 100
"""Characters of a line; lines of code of a Python function and of a CUDA or C++ function."""

LAYERS = ("char_gru.kernels.sizes", "char_gru.kernels.plan", "char_gru.kernels", "char_gru.rnn", "bench", "tests")
"""A module may import from its own layer and from those before it."""


def sources(*suffixes: str) -> list[Path]:
    """The files that git tracks or would track; all below the folder where it is no git checkout."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                            check=False)
    paths = [ROOT / line for line in listed.stdout.splitlines()] or list(ROOT.rglob("*"))
    return [path for path in paths if path.suffix in suffixes and path.is_file()]


def test_lines_are_short():
    long = [f"{path.relative_to(ROOT)}:{number}: {len(line)} characters" for path in sources(*SOURCES)
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > LINE]
    assert not long, "\n".join(long)


def python_functions(path: Path):
    """Name and lines of code, without docstrings, comments and blank lines, of every function."""
    text = path.read_text().splitlines()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = text[body[0].lineno - 1:node.end_lineno] if body else []
            yield node.name, sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def cuda_functions(text: str):
    """Head and lines of code of every function that is defined in a file, or in a struct of it."""
    lines = [re.sub(r"//.*|\"(\\.|[^\"])*\"|'(\\.|[^'])*'", "", line) for line in text.splitlines()]
    blocks, head = [], ""  # of each block that is open: its first line, and its head if it is a function, else ""
    for number, line in enumerate(lines):
        for character in line:
            if character == "{":
                inside = any(function for _, function in blocks)
                blocks.append((number, head.strip() if ")" in head and not inside else ""))
            elif character == "}":
                first, function = blocks.pop()
                if function:
                    yield function, sum(bool(code.strip()) for code in lines[first:number + 1])
            head = "" if character in "{};" else head + character
        head += " "
    assert not blocks


def test_functions_are_short():
    long = [f"{path.relative_to(ROOT)}: {name} has {count} lines of code" for path in sources(".py")
            for name, count in python_functions(path) if count > FUNCTION]
    long += [f"{path.relative_to(ROOT)}: {name} has {count} lines of code"
             for path in sources(".cu", ".cuh", ".h", ".cpp")
             for name, count in cuda_functions(path.read_text()) if count > KERNEL]
    assert not long, "\n".join(long)


def test_long_cuda_function_is_found():
    body = "    x = 1;  // }\n" * 5 + "    for (int i = 0; i < 3; ++i) {\n        g(i);\n    }\n"
    [(name, count)] = cuda_functions("struct S {\n    int x;\n};\n__device__ void f(int x)\n{\n" + body + "\n}\n")
    assert name == "__device__ void f(int x)" and count == 10


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"char_gru.{name}" if name.split(".")[0] in ("kernels", "rnn") else name


def imported_modules(path: Path, modules: set[str]):
    """The project's modules that a module imports when it is imported, and not later in a function."""
    tree = ast.parse(path.read_text())
    inside = {id(child) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)
              for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield from ([full] if full in modules else [node.module] if node.module in modules else [])


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Module -> the project's modules that it imports."""
    by_name = {module_of(path): path for path in sources(".py")}
    return {name: {*imported_modules(path, by_name.keys())} - {name} for name, path in by_name.items()}


def layer(module: str) -> int:
    """The number of a module's layer; the programs and the package itself lie on top of rnn."""
    found = [index for index, prefix in enumerate(LAYERS) if f"{module}.".startswith(f"{prefix}.")]
    return min(found, default=LAYERS.index("char_gru.rnn"))


def test_imports_point_downwards(imports):
    assert imports["char_gru.rnn.devices"] >= {"char_gru.kernels", "char_gru.rnn.cpu"}
    upwards = [f"{name} imports {other}" for name, others in imports.items() for other in others
               if layer(other) > layer(name)]
    assert not upwards, "\n".join(upwards)


def test_imports_go_in_no_circle(imports):
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"circle: {' -> '.join((*way[way.index(name):], name))}"
        if name not in done:
            for other in sorted(imports[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in imports:
        visit(name, ())
