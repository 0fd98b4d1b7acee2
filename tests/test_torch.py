"""The module for PyTorch takes the place of torch.nn.GRU: results, gradients, exceptions, and PyTorch's machinery."""

import contextlib
import copy
import itertools
import pickle
import weakref
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.rnn import gru, reference
from tests.helpers.compare import assert_close, assert_within

torch = pytest.importorskip("torch")

from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from char_gru.rnn import torch as module
from char_gru.rnn.torch import GRU, replace_gru

T, B, I, H = 5, 3, 4, 6
FLOAT64 = 1e-12
"""The error that a result in float64 may have, relative to its tensor's largest entry."""


def a_pair(*arguments, dtype=torch.float64, **options) -> tuple[torch.nn.GRU, GRU]:
    """PyTorch's module and ours, with the same parameters."""
    torch.manual_seed(1)
    theirs = torch.nn.GRU(*(arguments or (I, H)), dtype=dtype, **options)
    ours = GRU(*(arguments or (I, H)), dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def random(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def data(result):
    return result.data if isinstance(result, PackedSequence) else result


def results(gru_module, input, hx=None, uses: str = "both") -> dict[str, np.ndarray]:
    """Output, last states, and the gradients of a loss with random weights, of the leaves among input and hx and of
    all parameters. uses: both, or only the output or only the last states: what the loss depends on."""
    leaves = {"input": data(input), "hx": hx} | dict(gru_module.named_parameters())
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    output, h_n = gru_module(input, hx)
    loss = 0
    for name, result, seed in (("output", data(output), 3), ("states", h_n, 4)):
        if uses in ("both", name):
            loss = loss + (result * random(*result.shape, dtype=result.dtype, seed=seed)).sum()
    gradients = torch.autograd.grad(loss, leaves.values())
    return {"output": data(output).detach().numpy(), "states": h_n.detach().numpy()} | {
        f"d{name}": gradient.numpy() for name, gradient in zip(leaves, gradients)}


def assert_equal_up_to_rounding(actual: dict, exact: dict, single: dict | None = None) -> None:
    """Assert that results agree. single: results in float32 by PyTorch, if the actual ones are in float32; then all of
    them are compared together, for in a tensor of one number the error of float32 may be 0 by chance."""
    assert actual.keys() == exact.keys()
    if single is not None:
        actual, exact, single = (np.concatenate([array.ravel() for array in arrays.values()])
                                 for arrays in (actual, exact, single))
        assert_close("results", actual, exact, single)
        return
    for name, array in actual.items():
        assert array.shape == exact[name].shape and array.dtype == exact[name].dtype, name
        assert_within(name, np.abs(array - exact[name]).max(initial=0), FLOAT64 * np.abs(exact[name]).max(initial=0))


def assert_agree(theirs, ours, input, hx=None) -> None:
    """Assert that two modules in float64 have the same results."""
    assert_equal_up_to_rounding(results(ours, input, hx), results(theirs, input, hx))


# Results

class Setting(NamedTuple):
    """Sizes and options of a module, and which input it is given."""

    sizes: tuple[int, int, int]  # input_size, hidden_size, num_layers
    bias: bool
    batch_first: bool
    bidirectional: bool
    kind: str  # batched, unbatched, packed
    lengths: list[int]  # of packed sequences, in any order
    T: int
    B: int
    has_hx: bool
    frozen: frozenset[str]  # what requires no gradient
    uses: str
    dtype: torch.dtype

    def inputs(self, dtype) -> tuple:
        """Input and hx."""
        input_size, hidden_size, layers = self.sizes
        states, options = layers * (1 + self.bidirectional), {"dtype": dtype}
        if self.kind == "packed":
            rows = [random(length, input_size, seed=b, dtype=self.dtype) for b, length in enumerate(self.lengths)]
            input, B = pack_sequence(rows, enforce_sorted=False).to(dtype), (len(rows),)
        else:
            B = () if self.kind == "unbatched" else (self.B,)
            shape = (*B, self.T) if self.batch_first else (self.T, *B)
            input = random(*(shape if B else (self.T,)), input_size, dtype=self.dtype).to(**options)
        data(input).requires_grad_("input" not in self.frozen)
        hx = random(states, *B, hidden_size, dtype=self.dtype, seed=9).to(**options) if self.has_hx else None
        return input, None if hx is None else hx.requires_grad_("hx" not in self.frozen)


small, switch = st.integers(1, 9), st.booleans()
settings_of_modules = st.builds(
    Setting, sizes=st.tuples(small, small, st.integers(1, 3)), bias=switch, batch_first=switch, bidirectional=switch,
    kind=st.sampled_from(["batched", "unbatched", "packed"]),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), T=st.integers(1, 6), B=st.integers(0, 4),
    has_hx=switch,
    frozen=st.frozensets(st.sampled_from(["input", "hx", "weight_hh_l0", "bias_hh_l0"])),
    uses=st.sampled_from(["both", "output", "states"]), dtype=st.sampled_from([torch.float32, torch.float64]))


@pytest.mark.slow
@settings(max_examples=100)
@given(settings_of_modules)
def test_results_gradients_and_state_dict_are_those_of_pytorch(setting):
    options = {"bias": setting.bias, "batch_first": setting.batch_first, "bidirectional": setting.bidirectional,
               "dtype": setting.dtype}
    theirs, ours = torch.nn.GRU(*setting.sizes, **options), GRU(*setting.sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    for gru_module, (name, parameter) in itertools.product((theirs, ours), theirs.named_parameters()):
        gru_module.get_parameter(name).requires_grad_(name not in setting.frozen)
    actual = results(ours, *setting.inputs(setting.dtype), setting.uses)
    if setting.dtype == torch.float64:
        assert_equal_up_to_rounding(actual, results(theirs, *setting.inputs(torch.float64), setting.uses))
    else:
        single = results(theirs, *setting.inputs(torch.float32), setting.uses)
        exact = results(theirs.double(), *setting.inputs(torch.float64), setting.uses)
        assert all(array.dtype == np.float32 for array in actual.values())
        assert_equal_up_to_rounding(actual, exact, single)
    back = torch.nn.GRU(*setting.sizes, **options)
    back.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))


def test_initial_values_names_and_description_are_those_of_pytorch():
    arguments, options = (I, H, 2), {"bidirectional": True, "dropout": 0.25, "batch_first": True}
    torch.manual_seed(5)
    theirs = torch.nn.GRU(*arguments, **options)
    torch.manual_seed(5)
    ours = GRU(*arguments, **options)
    assert repr(ours) == repr(theirs)
    for _ in range(2):
        for (name, parameter), (their_name, theirs_parameter) in zip(ours.named_parameters(), theirs.named_parameters(),
                                                                     strict=True):
            assert name == their_name and torch.equal(parameter, theirs_parameter)
        assert [[p.shape for p in layer] for layer in ours.all_weights] == [[p.shape for p in layer]
                                                                            for layer in theirs.all_weights]
        for gru_module in (theirs, ours):
            torch.manual_seed(6)
            gru_module.reset_parameters()
    ours.flatten_parameters()


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_is_that_of_pytorch_under_the_same_seed(packed):
    theirs, ours = a_pair(I, H, 3, dropout=0.4, bidirectional=True)
    x = random(T, B, I)
    input = pack_padded_sequence(x, torch.tensor([2, T, 3]), enforce_sorted=False) if packed else x
    torch.manual_seed(7)
    expected = theirs(input)
    torch.manual_seed(7)
    actual = ours(input)
    other = ours(input)
    assert torch.allclose(data(actual[0]), data(expected[0]), rtol=FLOAT64, atol=FLOAT64)
    assert not torch.allclose(data(actual[0]), data(other[0]))
    for gru_module in (theirs, ours):
        gru_module.eval()
    assert torch.allclose(data(ours(input)[0]), data(theirs(input)[0]), rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_are_central_differences(bidirectional):
    ours = GRU(1, 3, 2, bidirectional=bidirectional, dtype=torch.float64)
    x, hx = random(4, 2, 1).requires_grad_(), random(2 * (1 + bidirectional), 2, 3, seed=1).requires_grad_()
    names, parameters = zip(*ours.named_parameters())

    def function(x, hx, *parameters):
        return torch.func.functional_call(ours, dict(zip(names, parameters)), (x, hx))

    assert torch.autograd.gradcheck(function, (x, hx, *parameters), fast_mode=True)


def test_input_in_any_memory_order_has_the_same_results():
    theirs, ours = a_pair()
    for x in (random(B, T, I).transpose(0, 1), random(T, I, B).transpose(1, 2), random(T, B, 2 * I)[:, :, ::2],
              random(T, 1, I).expand(T, B, I), random(T, B, I).flip(0)):
        assert_agree(theirs, ours, x, random(B, 1, H).transpose(0, 1))


def test_parameter_with_transposed_storage_has_the_same_results():
    theirs, ours = a_pair()
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0"):
            setattr(ours, name, torch.nn.Parameter(getattr(theirs, name).t().contiguous().t()))
    assert_agree(theirs, ours, random(T, B, I))


def test_output_may_be_changed_in_place():
    theirs, ours = a_pair()
    x = random(T, B, I)
    gradients = []
    for gru_module in (theirs, ours):
        output, h_n = gru_module(x)
        output.mul_(2)
        h_n.add_(1)
        gradients.append(torch.autograd.grad((output**2).sum() + (h_n**2).sum(), list(gru_module.parameters())))
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-11) for a, b in zip(*gradients))


@pytest.mark.parametrize("dtype, precision", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_computed_in_float32_and_rounded(dtype, precision):
    ours = GRU(I, H, dtype=dtype)
    wide = copy.deepcopy(ours).float()
    x = random(T, B, I, dtype=dtype)
    output, h_n = ours(x)
    output.sum().backward()
    assert output.dtype == h_n.dtype == ours.weight_hh_l0.grad.dtype == dtype
    expected = wide(x.float())[0]
    assert torch.equal(output, expected.to(dtype)) and (output.float() - expected).abs().max() < precision


def test_autocast_has_results_in_float32():
    theirs, ours = a_pair(dtype=torch.float32)
    linear, x = torch.nn.Linear(I, I), random(T, B, I, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inner = linear(x)
        output, h_n = ours(inner, torch.zeros(1, B, H))
        loss = output.sum() + h_n.sum()
    assert inner.dtype == torch.bfloat16 and output.dtype == h_n.dtype == torch.float32
    assert torch.allclose(output, theirs(inner.float())[0], atol=1e-6)
    scaler.scale(loss).backward()
    assert linear.weight.grad.abs().max() > 0 and ours.weight_ih_l0.grad.isfinite().all()


@pytest.mark.slow
def test_training_has_the_losses_of_pytorch():
    curves = []
    ids = torch.randint(0, 7, (T + 1, B), generator=torch.Generator().manual_seed(2))
    for kind in (torch.nn.GRU, GRU):
        torch.manual_seed(3)
        model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(7, I), "gru": kind(I, H, 2),
                                     "output": torch.nn.Linear(H, 7)}).double()
        optimiser, losses = torch.optim.Adam(model.parameters(), 0.1), []
        for _ in range(30):
            logits = model["output"](model["gru"](model["embedding"](ids[:-1]))[0])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.3 * curves[0][0], curves[0]
    np.testing.assert_allclose(*curves, rtol=1e-9)


# Planted faults

def exchanged_gates(monkeypatch):
    forward = gru.forward

    def exchanged(x_tb, h0, W_ih, W_hh, *others):
        r, z, n = np.split(W_hh, 3)
        return forward(x_tb, h0, W_ih, np.concatenate([z, r, n]), *others)

    monkeypatch.setattr(gru, "forward", exchanged)


def forgotten_last_state(monkeypatch):
    backward = module.gru_forward._backward_fn
    monkeypatch.setattr(module.gru_forward, "_backward_fn", lambda ctx, dy_tb, dh_last, *kept:
                        backward(ctx, dy_tb, None, *kept))


def not_reversed(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "flip", lambda tensor, dim: tensor)
    padded = module._Packed.padded
    monkeypatch.setattr(module._Packed, "padded", lambda packed, x, backwards: padded(packed, x, 0))


def padded_end(monkeypatch):
    monkeypatch.setattr(module._Packed, "last", lambda packed, y_tb: y_tb[-1])


@pytest.mark.parametrize("fault, packed", [(exchanged_gates, False), (forgotten_last_state, False),
                                           (not_reversed, False), (not_reversed, True), (padded_end, True)])
def test_planted_fault_is_noticed(monkeypatch, fault, packed):
    theirs, ours = a_pair(I, H, 2, bidirectional=True)
    x = random(T, B, I)
    input = pack_padded_sequence(x, torch.tensor([2, T, 3]), enforce_sorted=False) if packed else x
    expected = results(theirs, input)
    assert_equal_up_to_rounding(results(ours, input), expected)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        assert_equal_up_to_rounding(results(ours, input), expected)


# Exceptions

def sequences(input_size: int, dtype=torch.float32) -> PackedSequence:
    return pack_sequence([torch.zeros(length, input_size, dtype=dtype) for length in (3, 2)])


zeros = torch.zeros
WRONG_CALLS = {
    "1-D": lambda gru: gru(zeros(I)),
    "4-D": lambda gru: gru(zeros(T, B, I, 1)),
    "other width": lambda gru: gru(zeros(T, B, I + 1)),
    "no steps": lambda gru: gru(zeros(0, B, I)),
    "no steps, unbatched": lambda gru: gru(zeros(0, I)),
    "hx of another batch": lambda gru: gru(zeros(T, B, I), zeros(2, B + 1, H)),
    "hx of other units": lambda gru: gru(zeros(T, B, I), zeros(2, B, H + 1)),
    "hx of other layers": lambda gru: gru(zeros(T, B, I), zeros(3, B, H)),
    "hx unbatched": lambda gru: gru(zeros(T, B, I), zeros(2, H)),
    "hx batched, input not": lambda gru: gru(zeros(T, I), zeros(2, 1, H)),
    "hx of other layers, unbatched": lambda gru: gru(zeros(T, I), zeros(3, H)),
    "float64": lambda gru: gru(zeros(T, B, I, dtype=torch.float64)),
    "integers": lambda gru: gru(zeros(T, B, I, dtype=torch.int64)),
    "no tensor": lambda gru: gru([1.0]),
    "packed, other width": lambda gru: gru(sequences(I + 1)),
    "packed, float64": lambda gru: gru(sequences(I, torch.float64)),
    "packed, hx of another batch": lambda gru: gru(sequences(I), zeros(2, B, H)),
    "packed, hx unbatched": lambda gru: gru(sequences(I), zeros(2, H)),
    "other device": lambda gru: gru(zeros(T, B, I, device="meta")),
}
WRONG_ARGUMENTS = {
    "proj_size": {"proj_size": 0}, "no units": {"hidden_size": 0}, "no inputs": {"input_size": -1},
    "no layers": {"num_layers": 0}, "dropout": {"dropout": 1.5}, "bias": {"bias": 1}, "batch_first": {"batch_first": 1},
    "unknown": {"units": 3}, "a float": {"hidden_size": 3.0},
}


def raised(call) -> tuple[type, str]:
    with pytest.raises(Exception) as info:
        call()
    return info.type, str(info.value)


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_call_raises_what_pytorch_raises(name):
    theirs, ours = a_pair(I, H, 2, dtype=torch.float32)
    call = WRONG_CALLS[name]
    assert raised(lambda: call(ours)) == raised(lambda: call(theirs))


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_wrong_argument_raises_what_pytorch_raises(name):
    options = {"input_size": I, "hidden_size": H} | WRONG_ARGUMENTS[name]
    assert raised(lambda: GRU(**options)) == raised(lambda: torch.nn.GRU(**options))


def test_hx_of_another_dtype_or_device_is_refused():
    ours = GRU(I, H)
    with pytest.raises(RuntimeError, match="^input and hx must have the same dtype, but got torch.float32 and "):
        ours(zeros(T, B, I), zeros(1, B, H, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="^Input and hidden tensors are not at the same device"):
        ours(zeros(T, B, I), zeros(1, B, H, device="meta"))


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="^precision: expected auto, fp32, tf32, bf16, got 'fp8'"):
        GRU(I, H, precision="fp8")


def test_dropout_of_one_layer_warns_as_pytorch_does():
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        GRU(I, H, dropout=0.5)


def test_second_derivative_is_refused():
    _, ours = a_pair()
    x = random(T, B, I).requires_grad_()
    [dx] = torch.autograd.grad(ours(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="^char-gru's GRU has no second derivative: take torch.nn.GRU"):
        dx.sum().backward()


# What is kept and computed

@pytest.fixture
def kept(monkeypatch):
    """References to the gates of every forward pass."""
    forward, references = gru.forward, []

    def noted(*arguments):
        saved = forward(*arguments)
        references.append(weakref.ref(saved.gates_tb))
        return saved

    monkeypatch.setattr(gru, "forward", noted)
    return references


def test_gates_are_kept_until_the_backward_pass_and_only_for_it(kept):
    ours = GRU(I, H)
    x = torch.zeros(T, B, I)
    with torch.no_grad():
        output = ours(x)[0]
    assert kept.pop()() is None
    output = ours(x)[0]
    gates = kept.pop()
    assert gates() is not None
    output.sum().backward()
    assert gates() is None
    ours.requires_grad_(False)
    output = ours(x)[0]
    assert kept.pop()() is None and not output.requires_grad


@pytest.mark.parametrize("needs_dx", [False, True])
def test_gradient_of_the_input_is_computed_only_if_needed(monkeypatch, needs_dx):
    backward, asked = gru.backward, []
    monkeypatch.setattr(gru, "backward", lambda *arguments, **options: (asked.append(options["needs_dx"]),
                                                                        backward(*arguments, **options))[1])
    GRU(I, H, 2)(torch.zeros(T, B, I, requires_grad=needs_dx))[0].sum().backward()
    assert asked == [True, needs_dx]  # the upper layer hands its gradient down


# PyTorch's machinery

def op_arguments(needs_grad: bool = True, bias: bool = True, dtype=torch.float64) -> tuple:
    shapes = (T, B, I), (B, H), (3 * H, I), (3 * H, H), (3 * H,), (3 * H,)
    tensors = [random(*shape, seed=seed, dtype=dtype).requires_grad_(needs_grad) for seed, shape in enumerate(shapes)]
    return (*tensors, "fp32") if bias else (*tensors[:4], None, None, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_operators_keep_the_rules_of_pytorch(bias):
    arguments = op_arguments(bias=bias)
    torch.library.opcheck(module.gru_forward, arguments)
    x_tb, _, W_ih, W_hh, *_ = (tensor.detach() for tensor in arguments[:4])
    kept = [tensor.detach() for tensor in module.gru_forward(*arguments)[2:]]
    for needs_dx in (False, True):
        torch.library.opcheck(module.gru_backward, (random(T, B, H), x_tb, W_ih, W_hh, *kept, needs_dx, "fp32"))


def test_gradients_of_the_operator_are_central_differences():
    *tensors, precision = op_arguments()
    assert torch.autograd.gradcheck(lambda *tensors: module.gru_forward(*tensors, precision)[:2], tensors,
                                    fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}])
def test_compiled_module_has_the_same_results_also_with_new_weights(options):
    theirs, ours = a_pair(I, H, **options)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    states = theirs.num_layers * (1 + theirs.bidirectional)
    for seed in range(2):
        x = random(*((B, T) if theirs.batch_first else (T, B)), I, seed=seed).requires_grad_()
        actual = results(compiled, x, random(states, B, H))
        expected = results(theirs, x, random(states, B, H))
        assert_equal_up_to_rounding({name.replace("_orig_mod.", ""): array for name, array in actual.items()}, expected)
        theirs.reset_parameters()
        ours.load_state_dict(theirs.state_dict())


@pytest.mark.slow
def test_compiled_module_takes_what_autocast_makes():
    _, ours = a_pair(dtype=torch.float32)
    linear, x = torch.nn.Linear(I, I), random(T, B, I, dtype=torch.float32)

    def function(x):
        return ours(linear(x))[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = function(x), torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert actual.dtype == torch.float32 and torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # PyTorch's own
def test_module_compiles_with_the_default_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    theirs, ours = a_pair(batch_first=True)
    x, hx, dy = random(B, T, I).requires_grad_(), random(1, B, H), random(B, T, H)
    compiled = torch.compile(lambda x, hx: ours(x, hx)[0], fullgraph=True)  # no op that needs a minute of C++
    results = []
    for gru_module, output in ((theirs, theirs(x, hx)[0]), (ours, compiled(x, hx))):
        results.append([output, *torch.autograd.grad(output, [x, *gru_module.parameters()], dy)])
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-11) for a, b in zip(*results))


@pytest.mark.slow
def test_exported_program_has_the_same_results_for_other_sizes():
    theirs, ours = a_pair(bidirectional=True)
    sizes = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    program = torch.export.export(ours, (random(T, B, I),), dynamic_shapes=(sizes,)).module()
    x = random(T + 4, B + 2, I)
    assert torch.allclose(program(x)[0], theirs(x)[0], rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_module_has_the_same_results(use_reentrant):
    theirs, ours = a_pair()
    x = random(T, B, I).requires_grad_()
    output, _ = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=use_reentrant)
    output.sin().sum().backward()
    checkpointed = [x.grad.clone(), *(parameter.grad for parameter in ours.parameters())]
    expected = torch.autograd.grad(theirs(x)[0].sin().sum(), [x, *theirs.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-11) for a, b in zip(checkpointed, expected))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gru_module: pickle.loads(pickle.dumps(gru_module))])
def test_copies_are_equal_and_independent(copied):
    theirs, ours = a_pair(I, H, 2)
    ours.eval()
    other = copied(ours)
    assert not other.training and repr(other) == repr(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert_agree(theirs, other, random(T, B, I))


def test_module_in_distributed_data_parallel_has_the_same_results(tmp_path):
    """In a group of one process, which reduces gradients as a larger one does."""
    _, ours = a_pair(I, H, 2)
    expected = results(ours, random(T, B, I))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(ours)
        output, h_n = wrapped(random(T, B, I))
        loss = (output * random(*output.shape, seed=3)).sum() + (h_n * random(*h_n.shape, seed=4)).sum()
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    np.testing.assert_array_equal(output.detach().numpy(), expected["output"])
    for name, parameter in ours.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), expected[f"d{name}"], rtol=FLOAT64)


def test_parametrised_weight_serves():
    _, ours = a_pair()
    torch.nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    output, _ = ours(random(T, B, I))
    output.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in ours.parameters())


def test_every_gru_of_a_model_is_replaced_and_keeps_its_parameters():
    class Own(torch.nn.GRU):
        pass

    torch.manual_seed(2)
    shared, calls = torch.nn.GRU(I, I), []
    model = torch.nn.ModuleDict({
        "a": torch.nn.ModuleList([torch.nn.GRU(I, H, 2, dropout=0.5), torch.nn.Linear(H, I)]), "shared": shared,
        "again": shared, "own": Own(I, H)}).double().eval()
    shared.register_forward_hook(lambda *_: calls.append(1))

    def run(x):
        x = model["a"][1](model["a"][0](x)[0])
        return model["again"](model["shared"](x)[0])[0]

    x, before = random(T, B, I), dict(model.named_parameters())
    expected = run(x)
    assert replace_gru(model) is model
    assert type(model["a"][0]) is GRU and model["shared"] is model["again"] and type(model["own"]) is Own
    assert type(model["shared"]) is GRU and not model["a"][0].training
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is parameter for name, parameter in before.items())
    assert torch.allclose(run(x), expected, rtol=FLOAT64, atol=FLOAT64) and len(calls) == 4
    assert model.float()["shared"](x.float())[0].dtype == torch.float32


def test_model_that_is_a_gru_is_replaced_by_what_is_returned():
    theirs, _ = a_pair(I, H, 2)
    ours = replace_gru(theirs, precision="tf32")
    assert type(ours) is GRU and ours.precision == "tf32" and ours.weight_hh_l1 is theirs.weight_hh_l1
    assert_agree(theirs, ours, random(T, B, I))


def test_projection_is_refused_before_anything_is_replaced():
    model = torch.nn.ModuleDict({"one": torch.nn.GRU(I, H),
                                 "two": torch.nn.GRU(I, H, 1, True, False, 0.0, False, H - 1)})
    with pytest.raises(ValueError, match="^two: expected proj_size 0, got 5$"):
        replace_gru(model)
    assert type(model["one"]) is torch.nn.GRU
    with pytest.raises(ValueError, match="^precision: "):
        replace_gru(model, precision="fp8")


# On the kernels

@pytest.fixture
def on_kernels(executor, monkeypatch):
    """Tensors of the CPU are handed to the kernels, which run on the CPU too."""
    if runtime.current_executor().array_type is not np.ndarray:
        pytest.skip("the tensors are on the CPU, the kernels on the GPU")

    @contextlib.contextmanager
    def device_of(tensor, precision):
        yield module._Device(kernels.op_set(precision), lambda tensor: tensor.detach().contiguous().numpy(),
                             torch.from_numpy)

    monkeypatch.setattr(module, "_device_of", device_of)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}], ids=str)
def test_results_on_the_kernels_are_those_of_pytorch(on_kernels, options):
    theirs, ours = a_pair(I, H, dtype=torch.float32, **options)
    input = pack_padded_sequence(random(T, B, I, dtype=torch.float32), torch.tensor([2, T, 3]), enforce_sorted=False)
    actual, single = results(ours, input), results(theirs, input)
    assert_equal_up_to_rounding(actual, results(theirs.double(), input.to(torch.float64)), single)


def test_batch_of_no_rows_on_the_kernels_has_zero_gradients(on_kernels):
    ours = GRU(I, H, 2)
    output, h_n = ours(zeros(T, 0, I))
    (output.sum() + h_n.sum()).backward()
    assert output.shape == (T, 0, H) and not any(parameter.grad.any() for parameter in ours.parameters())


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_precision_of_the_module_is_that_of_the_products(on_kernels, precision):
    ours = GRU(I, H, precision=precision)
    x, h0, dy_tb = random(T * B, I, seed=1), random(B, H, seed=2), random(T, B, H, seed=3)
    output, _ = ours(x.float().view(T, B, I), h0.float()[None])
    [dW_hh] = torch.autograd.grad((output * dy_tb.float()).sum(), ours.weight_hh_l0)
    W_ih, W_hh, b_ih, b_hh = (parameter.detach().double().numpy() for parameter in ours.parameters())
    x, h0 = (tensor.float().double().numpy() for tensor in (x, h0))

    def by_reference(precision):
        ids_tb = np.arange(T * B).reshape(T, B)
        P = reference.input_table_forward(x, W_ih, b_ih, precision)
        saved = reference.gru_forward(P, ids_tb, W_hh, b_hh, h0, precision)
        gradients = reference.gru_backward(dy_tb.float().double().numpy(), None, ids_tb, W_hh, saved, T * B, precision)
        return {"output": saved.h_tb[1:], "dW_hh": gradients[1]}

    # A value next to a tie may be rounded to either side, which is much less than what the precision rounds in all.
    exact, rounded = by_reference("fp32"), by_reference(precision)
    for name, array in (("output", output.detach().numpy()), ("dW_hh", dW_hh.numpy())):
        allowed = 0.3 * np.abs(rounded[name] - exact[name]).max() + 1e-6
        assert_within(name, np.abs(array - rounded[name]).max(), allowed)
