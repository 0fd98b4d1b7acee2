"""`train.py` and `generate.py` with `--device cuda`, under the real CuPy, each kernel run from the PTX that NVRTC made
of it for this GPU: from the user's command down to the instructions, in processes of their own."""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from char_gru.rnn.checkpoint import find_checkpoint, load_checkpoint
from tests import cuda_device
from tests.helpers.commands import ROOT, TINY, make_text, run, train_here
from tests.helpers.texts import assert_samples_drawn, assert_texts_drawn
from tests.test_generate_command import RULE
from tests.test_train_command import metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cuda_device.installable(), reason="needs Linux on x86-64, CuPy and a C++ compiler")]

OPTIONS = ("--data", "text.txt", *TINY, "--epochs", 2, "--save-every", 1, "--out", "run")
STEPS = 12  # four of them after the end of an epoch
FEW_STEPS = 7
TRAINING = {"gru_forward_persistent", "gru_backward_persistent", "cross_entropy_forward", "mean_loss", "column_sums",
            "matmul_nn", "matmul_nt", "matmul_tn", "square_sums", "norm_of_sums", "adam"}
"""Kernels of a training step of this model."""

ROUNDING = {"fp32": 5e-7, "tf32": 3e-5, "bf16": 2e-4}  # of losses, relative; at least four times what they differ


class Trained(NamedTuple):
    folder: Path
    launches: dict[str, int]  # kernel -> launches from PTX


def launches_in(stderr: str) -> dict[str, int]:
    """Kernel -> launches from PTX, as the device counts them; it must count none from source."""
    [line] = re.findall(r"^cuda_device: \d+ launches from PTX: (.*); 0 launches from source$", stderr, re.MULTILINE)
    return {kernel: int(count) for kernel, count in (entry.split() for entry in line.split(", "))}


def trained(folder: Path, *options, device: tuple) -> Trained:
    make_text(folder / "text.txt")
    result = run("train.py", *OPTIONS, "--device", "cuda", *options, cwd=folder, cuda_device=("--ptx", *device))
    assert result.returncode == 0, result.stderr
    return Trained(folder / "run", launches_in(result.stderr))


@pytest.fixture(scope="module")
def on_hopper(tmp_path_factory) -> Trained:
    return trained(tmp_path_factory.mktemp("hopper"), "--precision", "fp32", "--steps", STEPS, device=("--gpu", "h100"))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cpu")
    make_text(folder / "text.txt")
    return train_here(*OPTIONS, "--device", "cpu", "--steps", STEPS, cwd=folder)


def losses(folder: Path) -> list[float]:
    return [value for line in metrics(folder) for name, value in line.items() if name in ("loss", "val_loss")]


def assert_equal_losses(actual: list[float], expected: list[float], precision: str) -> None:
    assert actual == pytest.approx(expected, rel=ROUNDING[precision])


def test_run_from_ptx_has_the_losses_of_the_cpu_and_draws_from_its_own_models(on_hopper, on_cpu):
    assert_equal_losses(losses(on_hopper.folder), losses(on_cpu), "fp32")
    assert_samples_drawn(on_hopper.folder)
    assert on_hopper.launches.keys() == TRAINING | {"generate_one_text"}
    assert on_hopper.launches["adam"] == STEPS


@pytest.mark.parametrize("gpu, precision, worst", [
    ("t4", "fp32", ()), ("h100", "tf32", ("--worst",)), ("h100", "bf16", ("--worst",))])
def test_steps_from_ptx_have_the_losses_of_the_cpu(on_cpu, tmp_path, gpu, precision, worst):
    """On tensor cores with sums and approximate instructions at their worst."""
    run = trained(tmp_path, "--precision", precision, "--steps", FEW_STEPS, device=("--gpu", gpu, *worst))
    assert_equal_losses(losses(run.folder)[:FEW_STEPS], losses(on_cpu)[:FEW_STEPS], precision)
    assert run.launches.keys() >= TRAINING
    assert run.launches["adam"] == FEW_STEPS


def test_text_from_ptx_is_drawn_from_the_model(on_hopper):
    prompts, options = ["a", "over the"], {"temperature": 0.5, "top_k": 4, "top_p": 0.9}
    result = run("generate.py", on_hopper.folder, "--device", "cuda", *(word for text in prompts for word in (
        "--prompt", text)), "--temperature", 0.5, "--top-k", 4, "--top-p", 0.9, "--length", 60, "--seed", 3,
        cwd=on_hopper.folder, cuda_device=("--ptx",))
    assert result.returncode == 0, result.stderr
    texts = result.stdout.removesuffix("\n").split(RULE)
    drawn = [text.removeprefix(prompt) for prompt, text in zip(prompts, texts, strict=True)]
    checkpoint = load_checkpoint(find_checkpoint(on_hopper.folder))
    assert {len(text) for text in drawn} == {60}
    assert_texts_drawn(checkpoint.params, checkpoint.vocabulary, prompts, drawn, seed=3, **options)
    assert {"pack_weights", "generate_persistent"} <= launches_in(result.stderr).keys()


# ---- Faults ----------------------------------------------------------------------------------------------------------

PLANTED = r"""
import sys
sys.path.insert(0, sys.argv[1])
from tests import cuda_device

device = cuda_device.install(from_ptx=True)
import cupy, numpy as np

module = cupy.RawModule(code='''#line 1 "kernels/planted.cu"
extern "C" __global__ void inside(float *x, const float *y, int distance) { x[threadIdx.x + 68] = y[threadIdx.x]; }
extern "C" __global__ void beyond(float *x, const float *y, int distance) { x[threadIdx.x + 69] = y[threadIdx.x]; }
extern "C" __global__ void into_another(float *x, const float *y, int distance) { x[distance] = y[threadIdx.x]; }
extern "C" __global__ void misaligned(float *x, const float *y, int distance) { *(float2 *)(x + 1) = float2{1, 2}; }
extern "C" __global__ void read_only(float *x, const float *y, int distance)
{
    x[threadIdx.x] = 1;
    x[threadIdx.x + 32] = __ldg(&x[distance & 31]);
}
''', options=("--std=c++17", "--generate-line-info"))
functions = [module.get_function(name) for name in sys.argv[2:]]
cupy.empty(4096, np.float32)  # an allocation, which the pool keeps
x, y = cupy.zeros(100, np.float32), cupy.zeros(100, np.float32)
assert y.data.ptr - x.data.ptr == 512  # parts of that allocation
arguments = x, y, np.int32(128)
for function in functions:
    function((1,), (32,), arguments)
    try:
        cupy.cuda.runtime.deviceSynchronize()
        print("no error", device.reports())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        print(error, device.reports()[0])
    device.reset()
print(device.summary())
"""

FAULTS = {  # kernel -> its line, the fault, how many bytes, the thread
    "beyond": (2, "outside its array", 4, 31),
    "into_another": (3, "outside its array", 4, 0),
    "misaligned": (4, "misaligned access", 8, 0),
    "read_only": (8, "ld.global.nc of what this launch has written", 4, 0),
}


def test_fault_of_a_kernel_is_a_failed_launch_with_a_report(subtests):
    """With the source line, the address, the block and the thread. All of them touch memory that is there."""
    result = run(PLANTED, ROOT, "inside", *FAULTS, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    inside, *faults, summary = result.stdout.splitlines()
    assert inside == "no error []"
    assert summary == "1 launches from PTX: inside 1; 0 launches from source"
    for (kernel, (line, fault, size, thread)), said in zip(FAULTS.items(), faults, strict=True):
        with subtests.test(kernel):
            assert re.fullmatch(
                rf"cudaErrorLaunchFailure: .* {kernel}: PTX line \d+ \(kernels/planted\.cu:{line}\): {fault}; "
                rf"address 0x[0-9a-f]+, {size} bytes; block 0 0 0, thread {thread} 0 0", said), said


TRAIN_WITH_A_FAULT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from char_gru.kernels import runtime
from char_gru.rnn import commands

read, right, wrong = runtime._read, "float4 *>(params)[i]", "float4 *>(params)[i + 1]"
runtime._read = lambda name: read(name).replace(right, wrong)
sys.exit(commands.train())
"""


def test_fault_of_a_kernel_ends_a_training_run_with_its_source_line(tmp_path):
    make_text(tmp_path / "text.txt")
    result = run(TRAIN_WITH_A_FAULT, ROOT, *OPTIONS, "--device", "cuda", "--precision", "fp32", "--steps", 1,
                 cwd=tmp_path, cuda_device=("--ptx",))
    adam = (ROOT / "kernels" / "adam.cu").read_text().splitlines()
    [line] = (number for number, text in enumerate(adam, 1) if "float4 *>(params)[i]" in text)
    assert re.search(rf"^cuda_device: adam: PTX line \d+ \(kernels/adam\.cu:{line}\): outside its array;",
                     result.stderr, re.MULTILINE), result.stderr
    assert re.search(r"^train\.py: the GPU failed: .*unspecified launch failure", result.stderr, re.MULTILINE)
    assert result.returncode == 2 and "adam" not in launches_in(result.stderr)


@pytest.mark.parametrize("options, said", [
    ("--cuda-device --ptx sm_75", "--ptx sm_75: the GPU of --device-like h100 has PTX for sm_90"),
    ("--cuda-device --ptx sm_90 --schedule fast", "--schedule: memory is not weak under --cuda-device"),
    ("--schedule fast", "--schedule needs --ptx ARCHITECTURE"),
    ("--worst", "--worst needs --ptx ARCHITECTURE")])
def test_options_that_do_not_go_together_are_refused(options, said):
    done = subprocess.run([sys.executable, "-m", "pytest", *options.split(), "tests/test_style.py"], cwd=ROOT,
                          check=False, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == f"ERROR: {said}"
