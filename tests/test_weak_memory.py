"""Kernels whose blocks exchange data, from PTX, with global memory as late and as stale as the PTX memory model allows:
they give the bits that they give when each access has its effect at once."""

import itertools

import numpy as np
import pytest

from char_gru.kernels import runtime
from char_gru.kernels.matmul import PRECISIONS
from tests import host_cuda, host_ptx
from tests.helpers.recurrence import assert_equal_bits, layer, on_device
from tests.helpers.texts import text_case, written_on_device
from tests.test_gru_persistent import Cut

pytestmark = pytest.mark.skipif(host_cuda.compiler() is None, reason="needs a C++ compiler")


def persistent(size: Cut, precision: str) -> dict[str, np.ndarray]:
    """Both passes of a recurrence."""
    return on_device(size.case, precision, size.plans(precision))


def stepwise(T: int, precision: str) -> dict[str, np.ndarray]:
    """Backward, several blocks sum each product, and the last one of them finishes it."""
    return on_device(layer(T, B=5, H=40, V=4, M=7), precision)


def text(T: int, R: int, layers: int, variant: str) -> dict[str, np.ndarray]:
    ids_tr, ids, h = written_on_device(text_case(R, H=9, V=5, layers=layers, scale=0.3), T, variant)
    return {"ids_tr": ids_tr, "ids": ids, "h": h}


def results_of(kernels, *arguments, **memory) -> dict[str, np.ndarray]:
    with runtime.use(host_ptx.PtxExecutor("sm_90", **memory)) as executor:
        results = kernels(*arguments)
    assert any(launch.grid != (1, 1, 1) for launch in executor.launches) and not executor.from_source
    return results


GROUPS = Cut(T=20, B=17, H=6, V=3, M=2, groups=2, rows=16, units=4, units_back=6, splits=2)
"""Has groups, ranges and tiles of rows."""

CASES = {
    **{f"persistent recurrence in {precision}": (persistent, GROUPS, precision) for precision in PRECISIONS},
    "stepwise recurrence": (stepwise, 3, "fp32"),
    **{f"text, {layers} layers": (text, 20, 2, layers, "persistent") for layers in (1, 2)},
    "one text": (text, 20, 1, 1, "one-text"),
}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", host_ptx.SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_weak_memory_changes_no_bit(name, schedule):
    kernels, *arguments = CASES[name]
    expected = results_of(kernels, *arguments)
    for seed in range(3):
        assert_equal_bits(results_of(kernels, *arguments, schedule=schedule, seed=seed), expected)


@pytest.mark.slow
@pytest.mark.parametrize("right, wrong", [
    ("states + (number + t) % 2 * width", "states"),  # a block overwrites the states that another one still needs
    ("return number + t + 1;", "return number + 1;"),  # old states pass for new ones
    ("gridDim.x, T + 1)", "gridDim.x, 0)"),  # the next launch takes the words of this one
])
def test_wrong_exchanges_of_a_text_are_noticed(right, wrong, monkeypatch):
    def texts() -> list[np.ndarray]:
        return [array for T in (3, 4, 5) for array in text(T, 1, 1, "one-text").values()]

    expected, source = results_of(lambda: dict(enumerate(texts()))), runtime.source

    def planted(stem, constants):
        whole = source(stem, constants)
        assert stem != "generate_one_text" or whole.count(right) == 1
        return whole.replace(right, wrong)

    monkeypatch.setattr(runtime, "source", planted)
    for schedule, seed in itertools.product(host_ptx.SCHEDULES, range(5)):
        try:
            actual = results_of(lambda: dict(enumerate(texts())), schedule=schedule, seed=seed)
        except RuntimeError as error:
            assert "deadlock" in str(error)
            return
        if any((actual[i] != expected[i]).any() for i in expected):
            return
    pytest.fail("all texts are right")


@pytest.mark.slow
def test_weak_memory_changes_no_bit_of_thousands_of_steps():
    """With as few threads as exchange data in both directions, which is what takes the time."""
    size = Cut(T=2000, B=1, H=3, V=3, M=2, groups=1, rows=16, units=2, units_back=2)
    assert_equal_bits(results_of(persistent, size, "fp32", schedule="random"), results_of(persistent, size, "fp32"))
