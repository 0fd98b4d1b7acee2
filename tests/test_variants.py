"""The table of variants names files, kernels and tests that exist, and leaves none out."""

import re
from pathlib import Path

import pytest

from char_gru.kernels import runtime
from char_gru.kernels.variants import VARIANTS

KERNELS = Path(runtime.__file__).parent
TESTS = Path(__file__).parent


def kernels_of(file: Path) -> set[str]:
    """The names of the kernels that a .cu file defines."""
    heads = re.findall(r'extern "C" __global__ void([^{;]*)\{', file.read_text())
    names = {re.search(r"(\w+)\s*\($", re.sub(r"__launch_bounds__\([^)]*\)", "", head).split("(")[0] + "(")[1]
             for head in heads}
    assert len(names) == file.read_text().count('extern "C" __global__'), file
    return names


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant.op} {variant.variant}")
def test_variant_names_what_there_is(variant):
    defined = set().union(*(kernels_of(KERNELS / file) for file in variant.files))
    assert set(variant.kernels) <= defined
    for file in variant.files:
        assert set(variant.kernels) & kernels_of(KERNELS / file)
    assert "def test_" in (TESTS / variant.test).read_text()


def test_every_kernel_of_every_file_is_in_the_table():
    defined = {(file.name, kernel) for file in KERNELS.glob("*.cu") for kernel in kernels_of(file)}
    listed = {(file, kernel) for variant in VARIANTS for file in variant.files for kernel in variant.kernels}
    assert defined - listed == set()


def test_each_variant_is_there_once():
    names = [(variant.op, variant.variant) for variant in VARIANTS]
    assert len(set(names)) == len(names)
