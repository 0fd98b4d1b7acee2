"""Tests the project with the oldest and the newest versions that pyproject.toml allows, and prints a table of them.

    pip install uv && python .ci/versions.py > tests/versions.txt    # all rows, two at a time
    python .ci/versions.py newest --python python3.14                # one row, with a Python of your choice

Every row is an environment of its own. All tests compile every kernel; the rows of CUDA, which run a part of them, do
so first, and count those that spill registers.

lowest          Python and each package that pyproject.toml names as old as it allows; README's test command
newest          the newest Python that uv finds and the newest packages; README's test command
cuda13-lowest   the oldest CUDA that the extra cuda13 allows; kernels from their PTX, the programs under CuPy
cuda12-lowest   the oldest CUDA that the extra cuda12 allows, likewise
cuda12-newest   the newest CUDA that the extra cuda12 allows, likewise
"""

import argparse
import concurrent.futures
import functools
import json
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EVERYTHING = (("-n", "auto", "--dist", "loadfile"),)
KERNELS = (("tests/test_host_ptx.py",), ("--cuda-device", "tests/test_cupy.py", "tests/test_commands_on_cuda.py"))
AT_A_TIME = 2
WIDTHS = (13, 7, 6, 6, 8, 27, 7, 13)


class Row(NamedTuple):
    """An environment, and what is run in it."""

    python: str  # oldest, newest
    packages: str  # uv's --resolution
    cuda: tuple[str, str] | None  # the extra that CUDA is taken from, and uv's --resolution of it
    tests: tuple[tuple[str, ...], ...]  # the arguments of pytest, for each run


ROWS = {"lowest": Row("oldest", "lowest-direct", None, EVERYTHING),
        "newest": Row("newest", "highest", None, EVERYTHING),
        "cuda13-lowest": Row("oldest", "highest", ("cuda13", "lowest"), KERNELS),
        "cuda12-lowest": Row("oldest", "highest", ("cuda12", "lowest"), KERNELS),
        "cuda12-newest": Row("oldest", "highest", ("cuda12", "highest"), KERNELS)}
MORE_HEADERS = {"cuda12": "nvidia-cuda-nvcc-cu12", "cuda13": "nvidia-cuda-crt"}
"""Extra -> the package of those headers that tests/cuda_device needs and CuPy does not."""


def output(*command, **options) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, **options).stdout


def python_of(age: str) -> str:
    """The oldest Python that pyproject.toml allows, or the newest on this machine."""
    if age == "oldest":
        return re.search(r"[\d.]+", PROJECT["requires-python"])[0]
    found = json.loads(output("uv", "python", "list", "--only-installed", "--output-format", "json"))
    return max((tuple(python["version_parts"].values()), python["path"]) for python in found
               if python["implementation"] == "cpython" and python["variant"] == "default")[1]


def cuda_packages(extra: str, resolution: str) -> dict[str, str]:
    """Name -> version: of the extra, CuPy, NVRTC and CUDA's headers; and what only tests need of the same CUDA."""
    resolved = output("uv", "pip", "compile", "-q", "--resolution", resolution, "--only-binary", ":all:", "--no-header",
                      "--no-annotate", "--extra", extra, "--python-version", python_of("oldest"), "pyproject.toml")
    packages = {name: version for name, version in (line.split("==") for line in resolved.split())
                if re.match("cupy|nvidia-cuda-(nvrtc|runtime)", name)}
    [(major, minor)] = (version.split(".")[:2] for name, version in packages.items() if "runtime" in name)
    return packages | {MORE_HEADERS[extra]: f"{major}.{minor}.*", "cuda-bindings": f"{major}.*"}


def install(row: Row, python: str, folder: Path) -> Path:
    """Makes the environment; returns its Python. The project itself is not installed: tests take the checkout's."""
    output("uv", "venv", "-q", "--seed", "--python", python, folder)
    command = ["uv", "pip", "install", "-q", "--python", folder / "bin" / "python", "-r", "pyproject.toml",
               "--extra", "test", "--resolution", row.packages]
    if row.cuda:
        packages = cuda_packages(*row.cuda)
        overrides, excludes = folder / "overrides.txt", folder / "excludes.txt"
        overrides.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()))
        of_test = (re.match(r"(nvidia|cupy)-[\w-]+", needed) for needed in PROJECT["optional-dependencies"]["test"])
        excludes.write_text("".join(f"{name[0]}\n" for name in of_test if name and name[0] not in packages))
        command += ["--overrides", overrides, "--excludes", excludes, *packages]
    output(*command)
    return folder / "bin" / "python"


def versions(python: Path) -> list[str]:
    """Of Python, NumPy, CuPy, and of the NVRTC that is really loaded."""
    code = ("import platform, numpy, cupy; from char_gru.kernels.runtime import ptx_for; "
            "print(platform.python_version(), numpy.__version__, cupy.__version__, ptx_for('', 'sm_75'))")
    *packages, ptx = output(python, "-c", code).split(maxsplit=3)
    return [*packages, re.search(r"release .* V([\d.]+)", ptx)[1]]


def compiled(python: Path) -> tuple[list[str], list[str], list[int]]:
    """The architectures that NVRTC knows, and those that it does not; and how many bytes each kernel spills that it has
    compiled for one of them. Spills cost time, and change no result."""
    architectures = output(python, "-c", "from char_gru.kernels import runtime; print(*runtime.ARCHITECTURES)").split()
    known, unknown, spills = [], [], []
    for architecture in architectures:
        done = subprocess.run([python, "-m", "kernels", "--arch", architecture], cwd=ROOT, check=False, text=True,
                              capture_output=True)
        if "invalid value for --gpu-architecture" in done.stderr:
            unknown.append(architecture)
            continue
        done.check_returncode()
        known.append(architecture)
        spills += [int(line.split("|")[-1]) for line in done.stdout.splitlines()[1:]]
    return known, unknown, spills


def without(python: Path, architectures: list[str]) -> tuple[str, ...]:
    """Arguments of pytest that leave out the tests of GPUs of some architectures."""
    code = ("from char_gru.kernels.plan.gpus import GPUS; "
            f"print(*(name for name, gpu in GPUS.items() if f'sm_{{gpu.capability}}' in {architectures}))")
    names = output(python, "-c", code).split()
    return ("-k", f"not ({' or '.join(names)})") if names else ()


def tested(name: str, python: Path, arguments: tuple[str, ...]) -> tuple[str, bool]:
    """How many tests passed, as pytest says it at the end, and whether that is all of them. Lines of pytest go to
    stderr, the environment's name before them."""
    last = ""
    with subprocess.Popen([python, "-m", "pytest", "-q", *arguments], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            sys.stderr.write(f"{name}: {line}")
            last = line.strip() or last
    summary = re.sub(r", \d+ deselected| in [\d.]+s.*", "", last)
    return f"{shlex.join(('pytest', *arguments))}: {summary}", process.returncode == 0


def tried(name: str, newest_python: str | None) -> tuple[str, bool]:
    """The row of an environment, and whether all of its tests passed."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = ROWS[name]
        chosen = newest_python if newest_python and wanted.python == "newest" else python_of(wanted.python)
        python = install(wanted, chosen, Path(folder))
        unknown, kernels = [], ("", "", "")
        if wanted.cuda:
            known, unknown, spills = compiled(python)
            kernels = (", ".join([*known, *(f"not {name}" for name in unknown)]).replace("sm_", ""), len(spills),
                       f"{sum(map(bool, spills))}" + f", {max(spills)} bytes" * any(spills))
        results = [tested(name, python, (*arguments, *without(python, unknown))) for arguments in wanted.tests]
        cells = (name, *versions(python), *kernels, "; ".join(text for text, _ in results))
        return row(cells), all(complete for _, complete in results)


def row(cells) -> str:
    return " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, (*WIDTHS, 0))).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], metavar="environment", help="(default: all)")
    parser.add_argument("--python", help="the Python of the row newest")
    options = parser.parse_args()
    passed = True
    print(row(("environment", "Python", "NumPy", "CuPy", "NVRTC", "architectures (sm_)", "kernels", "of them spill",
               "tests")))
    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
        for line, complete in pool.map(functools.partial(tried, newest_python=options.python), options.rows or ROWS):
            print(line, flush=True)
            passed &= complete
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
