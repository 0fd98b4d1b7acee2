"""What `pip install` puts where, and the public names of `import char_gru`."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import char_gru
from char_gru.kernels.modules import MODULES, PLANNED

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since building leaves folders behind."""
    checkout, wheels = (tmp_path_factory.mktemp(name) for name in ("checkout", "wheels"))
    for package in ("char_gru", "rnn", "kernels"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    subprocess.run([*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, checkout], check=True)
    [built] = wheels.iterdir()
    return built


@pytest.fixture
def environment(tmp_path) -> Path:
    """The Python of a new virtual environment that also sees what these tests were installed with."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    [packages] = (tmp_path / "env").glob("lib/python*/site-packages")
    dependencies = tmp_path / "dependencies"  # links to all installed packages but ours
    dependencies.mkdir()
    for path in Path(np.__file__).parents[1].iterdir():
        if not path.name.startswith(("char_gru", "__editable__")):
            (dependencies / path.name).symlink_to(path)
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return tmp_path / "env" / "bin" / "python"


def pip(environment: Path, *arguments) -> None:
    subprocess.run([*PIP, "--python", environment, *arguments], check=True, capture_output=True)


def run(environment: Path, code: str, cwd: Path) -> str:
    done = subprocess.run([environment, "-c", code], cwd=cwd, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wheel_of_somebody_else(folder: Path) -> Path:
    """A distribution that owns the packages `kernels` and `rnn`."""
    path, info = folder / "somebody_else-1.0-py3-none-any.whl", "somebody_else-1.0.dist-info"
    files = {"kernels/__init__.py": "OWNER = 'somebody else'\n", "kernels/adam.py": "OWNER = 'somebody else'\n",
             "rnn/__init__.py": "OWNER = 'somebody else'\n", "rnn/model.py": "OWNER = 'somebody else'\n",
             f"{info}/METADATA": "Metadata-Version: 2.1\nName: somebody-else\nVersion: 1.0\n",
             f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(name, text)
    return path


THEIRS = "import kernels.adam, rnn.model; print(kernels.OWNER, kernels.adam.OWNER, rnn.OWNER, rnn.model.OWNER)"
OURS = ("import char_gru; generator = char_gru.Generator; "
        "from char_gru.kernels import runtime; runtime.source('adam', {}); print(char_gru.__file__)")


@pytest.mark.slow
def test_wheel_leaves_other_peoples_kernels_and_rnn_alone(wheel, environment, tmp_path):
    """Installed beside them, used with them, and uninstalled."""
    pip(environment, "install", "--no-deps", wheel_of_somebody_else(tmp_path))
    pip(environment, "install", "--no-deps", wheel)
    theirs = "somebody else somebody else somebody else somebody else\n"
    assert run(environment, THEIRS, tmp_path) == theirs
    assert str(tmp_path / "env") in run(environment, OURS, tmp_path)
    assert run(environment, f"{OURS.replace('print(char_gru.__file__)', THEIRS)}", tmp_path) == theirs
    pip(environment, "uninstall", "-y", "char-gru")
    assert run(environment, THEIRS, tmp_path) == theirs


@pytest.mark.slow
def test_installed_wheel_brings_its_kernels(wheel, tmp_path):
    """All sources are assembled, and one of them is compiled, from where they were installed."""
    home = tmp_path / "home"
    subprocess.run([*PIP, "install", "-q", "--no-deps", "--target", home, wheel], check=True)
    program = """if True:
        import sys
        from char_gru.kernels import modules, runtime
        assert sys.argv[1] in runtime.__file__, runtime.__file__
        sources = {stem: runtime.source(stem, constants) for stem, constants in modules.modules_for("sm_90")}
        print(*sources, *runtime.compile_for(sources["gru"], "sm_90"))"""
    done = subprocess.run([sys.executable, "-c", program, str(home)], cwd=tmp_path, check=True, text=True,
                          capture_output=True, env={"PYTHONPATH": str(home)})
    assert {*done.stdout.split()} == {*MODULES, *PLANNED, "gru_forward_step", "gru_backward_step"}


@pytest.mark.slow
def test_editable_install_uses_the_checkout(environment, tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", "tests", "results"))
    pip(environment, "install", "--no-deps", "--no-build-isolation", "-e", checkout)
    assert run(environment, OURS, tmp_path) == f"{checkout / 'char_gru' / '__init__.py'}\n"
    where = "from char_gru import kernels, rnn; print(kernels.__file__, rnn.__file__)"
    assert run(environment, where, tmp_path) == f"{checkout}/kernels/__init__.py {checkout}/rnn/__init__.py\n"


@pytest.mark.slow
def test_programs_of_a_checkout_run_the_checkout_even_where_another_one_is_installed(wheel, environment, tmp_path):
    pip(environment, "install", "--no-deps", wheel)
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
            "from char_gru import kernels; from char_gru.rnn import commands; "
            "print(kernels.__file__, commands.__file__)")
    assert run(environment, code, tmp_path) == f"{ROOT}/kernels/__init__.py {ROOT}/rnn/commands.py\n"


def test_public_names_are_there_and_nothing_is_imported_before_it_is_used():
    for name in char_gru.__all__:
        assert getattr(char_gru, name)
    assert {*char_gru.__all__} <= {*dir(char_gru)}
    with pytest.raises(AttributeError, match="no attribute 'Generater'"):
        getattr(char_gru, "Generater")  # noqa: B009
    code = "import sys, char_gru; print('numpy' in sys.modules, char_gru.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True, capture_output=True)
    assert done.stdout == f"False {char_gru.__version__}\n"


def test_readme_imports_public_names_only():
    imported = re.findall(r"^from char_gru(\S*) import (.*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert {module for module, _ in imported} == {"", ".rnn.torch"}
    defined = ast.parse((ROOT / "rnn" / "torch.py").read_text()).body  # PyTorch may not be installed
    public = {"": char_gru.__all__, ".rnn.torch": [node.name for node in defined if hasattr(node, "name")]}
    for module, names in imported:
        assert {name.strip() for name in names.split(",")} <= {*public[module]}


def test_readme_examples_run(tmp_path):
    """The two examples without PyTorch, with a small model, one after the other."""
    (tmp_path / "text.txt").write_text("ROMEO:\nJULIET: To be, or not to be\n" * 20, "utf-8")
    (tmp_path / "runs" / "shakespeare").mkdir(parents=True)
    readme = (ROOT / "README.md").read_text()
    training, writing = re.findall(r"```python\n(from char_gru import.*?)```", readme, flags=re.DOTALL)
    for old, new in (('"shakespeare",', '"text.txt",'), ("H=1024", "H=8"), ("E=256", "E=8"), ("T=100", "T=10"),
                     ("B=64", "B=4"), ("range(10)", "range(1)"), ("mine.", "runs/shakespeare/best."),
                     ("length=0", "length=20")):
        assert old in training + writing
        training, writing = training.replace(old, new), writing.replace(old, new)
    subprocess.run([sys.executable, "-c", training + writing], cwd=tmp_path, check=True,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})
