"""`GRU`, a module for PyTorch that takes the place of `torch.nn.GRU` and computes with char-gru's op sets.

    from char_gru.rnn.torch import GRU, replace_gru

    gru = GRU(input_size, hidden_size)     # arguments, parameters, results: those of torch.nn.GRU
    model = replace_gru(model)             # or every torch.nn.GRU of a model at once

One layer in one direction is a pair of operators of PyTorch, `char_gru::gru_forward` and `char_gru::gru_backward`,
which `torch.compile` and `torch.export` take as they are. Tensors of the CPU are computed by `char_gru.rnn.cpu` in
float32 or float64, tensors of an NVIDIA GPU by `char_gru.kernels` in float32, by CuPy, where they lie. float16 and
bfloat16 are converted to float32 and the results back.

Axes: T time, B batch, I inputs, H hidden units, L layers, D directions (1 or 2), N characters of packed sequences.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from char_gru import kernels
from char_gru.kernels.matmul import PRECISIONS
from char_gru.kernels.runtime import DeviceError, current_executor
from char_gru.kernels.scratch import unkept
from char_gru.rnn import cpu, gru


class GRU(torch.nn.Module):
    """`torch.nn.GRU` by char-gru: the same arguments, parameters, initial values, inputs, results and exceptions.

    A `state_dict` goes both ways. Not there: a second derivative, forward-mode derivatives, `torch.func.vmap`. Before
    `torch.cuda.graph` captures it, a forward and a backward pass of the same sizes have to load the kernels.

    Arguments: those of `torch.nn.GRU`; precision, of products on a GPU: fp32, tf32, bf16, or auto: tf32 where the GPU
    has it. The CPU does not ask. Under autocast a GPU that has bf16 takes it; states and results stay float32.
    Raises: ValueError, TypeError for arguments that `torch.nn.GRU` refuses, and for an unknown precision.
    """

    def __init__(self, *args, precision: str = "fp32", **kwargs) -> None:
        super().__init__()
        if precision not in ("auto", *PRECISIONS):
            raise ValueError(f"precision: expected auto, {', '.join(PRECISIONS)}, got {precision!r}")
        self._take_over(torch.nn.GRU(*args, **kwargs), precision)

    def _take_over(self, module: torch.nn.GRU, precision: str) -> None:
        """Become a module with the parameters, settings, hooks and mode of another one, which is given up."""
        self.__dict__.update({name: value for name, value in module.__dict__.items()
                              if not name.startswith("_flat_weight")})  # caches of parameters, for cuDNN
        self.precision = precision

    all_weights = torch.nn.GRU.all_weights
    extra_repr = torch.nn.GRU.extra_repr
    reset_parameters = torch.nn.GRU.reset_parameters

    def flatten_parameters(self) -> None:
        """Nothing: `torch.nn.GRU` has this function for cuDNN."""

    def forward(self, input: Tensor | PackedSequence,
                hx: Tensor | None = None) -> tuple[Tensor | PackedSequence, Tensor]:
        """Output and last states of the layers.

        Shapes: input (T, B, I), with `batch_first` (B, T, I), unbatched (T, I), or packed; hx (L*D, B, H), unbatched
        (L*D, H), default zeros; results: output like the input with D*H in place of I, last states like hx.
        Raises: what `torch.nn.GRU` raises for the same input.
        """
        if isinstance(input, PackedSequence):
            x, batch_sizes, sorted_indices, unsorted_indices = input
            self._check_input(x, 2)
            if hx is not None and sorted_indices is not None:
                hx = hx.index_select(1, sorted_indices)
            packed = _Packed.of(batch_sizes, x.device)
            y, h_n = self._layers(x, self._checked_state(x, hx, packed.B), packed)
            if unsorted_indices is not None:
                h_n = h_n.index_select(1, unsorted_indices)
            return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), h_n
        dim = input.dim()
        if dim not in (2, 3):
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {dim}D instead")
        if hx is not None and hx.dim() != dim:
            kind = "unbatched 2-D" if dim == 2 else "batched 3-D"
            raise RuntimeError(f"For {kind} input, hx should also be {dim}-D but got {hx.dim()}-D tensor")
        x_tb = input.unsqueeze(1) if dim == 2 else input.transpose(0, 1) if self.batch_first else input
        if dim == 2 and hx is not None:
            hx = hx.unsqueeze(1)
        self._check_input(x_tb, 3)
        hx = self._checked_state(x_tb, hx, x_tb.size(1))
        if x_tb.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        y_tb, h_n = self._layers(x_tb, hx, None)
        if dim == 2:
            return y_tb.squeeze(1), h_n.squeeze(1)
        return y_tb.transpose(0, 1) if self.batch_first else y_tb, h_n

    def _check_input(self, x: Tensor, dim: int) -> None:
        """Raises: ValueError, RuntimeError, as `torch.nn.GRU`."""
        weight = self.weight_ih_l0
        if x.dtype != weight.dtype and not _autocast(x.device):
            raise ValueError(f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). Convert "
                             f"input: input.to({weight.dtype}), or convert model: model.to({x.dtype})")
        if x.dim() != dim:
            raise RuntimeError(f"input must have {dim} dimensions, got {x.dim()}")
        if x.size(-1) != self.input_size:
            raise RuntimeError("input.size(-1) must be equal to input_size. "
                               f"Expected {self.input_size}, got {x.size(-1)}")
        if x.device != weight.device:
            raise RuntimeError("Input and parameter tensors are not at the same device, found input tensor at "
                               f"{x.device} and parameter tensor at {weight.device}")

    def _checked_state(self, x: Tensor, hx: Tensor | None, B: int) -> Tensor:
        """Initial states (L*D, B, H): hx, or zeros. Raises: RuntimeError, as `torch.nn.GRU`."""
        shape = self.num_layers * (1 + self.bidirectional), B, self.hidden_size
        if hx is None:
            return x.new_zeros(shape)
        if hx.shape != shape:
            raise RuntimeError(f"Expected hidden size {shape}, got {list(hx.shape)}")
        if hx.device != x.device:
            raise RuntimeError("Input and hidden tensors are not at the same device, found input tensor at "
                               f"{x.device} and hidden tensor at {hx.device}")
        if hx.dtype != x.dtype and not _autocast(x.device):
            raise RuntimeError(f"input and hx must have the same dtype, but got {x.dtype} and {hx.dtype}")
        return hx

    def _layers(self, x: Tensor, hx: Tensor, packed: "_Packed | None") -> tuple[Tensor, Tensor]:
        """All layers, one after the other. Shapes: x (T, B, I), or (N, I) if packed; hx (L*D, B, H); results like x
        with D*H in place of I, and like hx."""
        states, last = iter(hx.unbind(0)), []
        for layer in range(self.num_layers):
            outputs = []
            for backwards in range(1 + self.bidirectional):
                y, h_n = self._direction(x, next(states), layer, backwards, packed)
                outputs.append(y)
                last.append(h_n)
            x = torch.cat(outputs, -1) if self.bidirectional else y
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = torch.nn.functional.dropout(x, self.dropout)
        return x, torch.stack(last)

    def _direction(self, x: Tensor, h0: Tensor, layer: int, backwards: int,
                   packed: "_Packed | None") -> tuple[Tensor, Tensor]:
        """One layer, forwards or backwards in time. Shapes: as of `_layers`, h0 (B, H)."""
        suffix = f"l{layer}_reverse" if backwards else f"l{layer}"
        weights = [getattr(self, f"{name}_{suffix}") if self.bias or name.startswith("weight") else None
                   for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        dtype = weights[0].dtype
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        x_tb = packed.padded(x, backwards) if packed else x.flip(0) if backwards else x
        arguments = [None if tensor is None else tensor.to(wide) for tensor in (x_tb, h0, *weights)]
        y_tb, h_n, *_ = gru_forward(*arguments, _precision(self.precision, x.device))
        y_tb, h_n = y_tb.to(dtype), h_n.to(dtype)
        if packed:
            return packed.packed(y_tb, backwards), packed.last(y_tb)
        return y_tb.flip(0) if backwards else y_tb, h_n


def replace_gru(model: torch.nn.Module, precision: str = "fp32") -> torch.nn.Module:
    """Put a `GRU` in the place of every `torch.nn.GRU` of a model, with the same parameters, hooks and mode.

    An optimiser that has the parameters keeps them. Modules of a subclass of `torch.nn.GRU` stay as they are.

    Arguments: model, changed in place; precision, as of `GRU`. Returns the model, or the new module if the model is
    itself a `torch.nn.GRU`.
    Raises: ValueError for an unknown precision, or for a module with a proj_size, before anything is changed.
    """
    new = {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.GRU:
            if module.proj_size:
                raise ValueError(f"{name or 'model'}: expected proj_size 0, got {module.proj_size}")
            new[module] = GRU(1, 1, precision=precision)
    for module, replacement in new.items():
        replacement._take_over(module, precision)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = new.get(child, child)
    return new.get(model, model)


class _Packed(NamedTuple):
    """Where the characters of packed sequences lie in a padded array (T, B), each sequence forwards, or backwards from
    its own end, so that both directions begin at t = 0 and what follows a sequence cannot reach it.

    rows: for each direction (N,), t*B + b of the characters in their packed order; ends (B,), t*B + b of the last
    position of each sequence.
    """

    T: int
    B: int
    rows: tuple[Tensor, Tensor]
    ends: Tensor

    @staticmethod
    def of(batch_sizes: Tensor, device: torch.device) -> "_Packed":
        """Shapes: batch_sizes (T,), as a `PackedSequence` has them: falling, on the CPU."""
        T, B = len(batch_sizes), int(batch_sizes[0])
        present_tb = torch.arange(B) < batch_sizes[:, None]
        lengths = present_tb.sum(0)
        t, b = present_tb.nonzero(as_tuple=True)
        rows = t * B + b, (lengths[b] - 1 - t) * B + b
        return _Packed(T, B, tuple(row.to(device) for row in rows), ((lengths - 1) * B + torch.arange(B)).to(device))

    def padded(self, x: Tensor, backwards: int) -> Tensor:
        """Shapes: x (N, I); result (T, B, I), zero behind the end of a sequence."""
        return x.new_zeros(self.T * self.B, x.size(1)).index_copy(0, self.rows[backwards], x).view(self.T, self.B, -1)

    def packed(self, y_tb: Tensor, backwards: int) -> Tensor:
        """Shapes: y_tb (T, B, H); result (N, H)."""
        return y_tb.flatten(0, 1).index_select(0, self.rows[backwards])

    def last(self, y_tb: Tensor) -> Tensor:
        """Shapes: y_tb (T, B, H); result (B, H), the states at the end of each sequence."""
        return y_tb.flatten(0, 1).index_select(0, self.ends)


def _autocast(device: torch.device) -> bool:
    """Whether a region of `torch.autocast` is open for a device."""
    return device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)


def _precision(precision: str, device: torch.device) -> str:
    """The precision of products on a device: bf16 under autocast, where the GPU has it."""
    takes_bf16 = device.type == "cuda" and _autocast(device) and torch.cuda.get_device_properties(device).major >= 8
    return "bf16" if takes_bf16 else precision


# Operators

class _Device(NamedTuple):
    """An op set, and how tensors become its arrays and its arrays tensors, in the same memory."""

    ops: Any
    array: Callable[[Tensor], Any]
    tensor: Callable[[Any], Tensor]


@contextlib.contextmanager
def _device_of(tensor: Tensor, precision: str) -> Iterator[_Device]:
    """What computes on a tensor's device. On a GPU, work and memory inside the `with` are ordered by PyTorch's current
    stream, and the memory is PyTorch's, that of scratch arrays included.

    Raises: ValueError, DeviceError as `kernels.op_set`; ValueError for another GPU than the first one that was used.
    """
    if tensor.device.type == "cpu":
        yield _Device(cpu, lambda tensor: tensor.numpy(force=True), torch.from_numpy)
        return
    import cupy

    _start_kernels(tensor.device.index)
    with cupy.cuda.Device(tensor.device.index):
        ops = kernels.op_set(precision)
        if tensor.device.index != (first := current_executor().device_id):
            raise ValueError(f"input: expected a tensor of cuda:{first}, the GPU that char-gru computes on in this "
                             f"process, got one of {tensor.device}")
        with (unkept(), cupy.cuda.Stream.from_external(torch.cuda.current_stream(tensor.device)),
              cupy.cuda.using_allocator(cupy.cuda.PythonFunctionAllocator(_allocate, _free).malloc)):
            yield _Device(ops, lambda tensor: cupy.from_dlpack(tensor.detach().contiguous()), torch.from_dlpack)


@functools.cache
def _start_kernels(device: int) -> None:
    """Let the kernels meet the GPU in a thread that ends, for they make a stream the current one of that thread."""
    def start() -> None:
        import cupy

        with cupy.cuda.Device(device), contextlib.suppress(DeviceError):  # what is missing is told afterwards
            current_executor()

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()


def _allocate(size: int, device: int) -> int:
    """Memory of PyTorch's for an array of CuPy, used on CuPy's current stream."""
    import cupy

    return torch.cuda.caching_allocator_alloc(size, device, cupy.cuda.get_current_stream().ptr)


def _free(address: int, device: int) -> None:
    torch.cuda.caching_allocator_delete(address)


def _positions(x_tb: Tensor) -> Tensor:
    """The row of the input table for each position: made on the device, so that no op waits for the host."""
    T, B, _ = x_tb.shape
    return torch.arange(T * B, dtype=torch.int32, device=x_tb.device).view(T, B)


@torch.library.custom_op("char_gru::gru_forward", mutates_args=(), device_types=("cpu", "cuda"),
                         tags=(torch.Tag.cudagraph_unsafe,))
def gru_forward(x_tb: Tensor, h0: Tensor, W_ih: Tensor, W_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
                precision: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One GRU layer over a window.

    Shapes: x_tb (T, B, I); h0 (B, H); W_ih (3H, I); W_hh (3H, H); b_ih, b_hh (3H,), or None for zeros; results: the
    output (T, B, H) and the last state (B, H), both contiguous; and for the backward pass, in the memory order of the
    device's op set, h_tb (T+1, B, H), gates_tb (T, B, 3H) and a_n_tb (T, B, H).
    Raises: ValueError.
    """
    zeros = W_ih.new_zeros(len(W_ih))
    W_hh = W_hh.contiguous()  # it is read in every step
    arguments = x_tb, h0, W_ih, W_hh, zeros if b_ih is None else b_ih, zeros if b_hh is None else b_hh
    with _device_of(x_tb, precision) as (ops, array, tensor):
        saved = gru.forward(*map(array, arguments), ops, array(_positions(x_tb)))
        h_tb, gates_tb, a_n_tb = map(tensor, (saved.h_tb, saved.gates_tb, saved.a_n_tb))
        y_tb, h_n = (states.clone(memory_format=torch.contiguous_format) for states in (h_tb[1:], h_tb[-1]))
    return y_tb, h_n, h_tb, gates_tb, a_n_tb


@gru_forward.register_fake
def _(x_tb, h0, W_ih, W_hh, b_ih, b_hh, precision):
    (T, B, _), H = x_tb.shape, W_hh.shape[1]

    def steps(n: int) -> Tensor:
        return x_tb.new_empty(T, B, n) if x_tb.is_cuda else x_tb.new_empty(T, n, B).transpose(1, 2)

    h_tb = x_tb.new_empty(T + 1, B, H) if x_tb.is_cuda else x_tb.new_empty(H, T + 1, B).permute(1, 2, 0)
    return x_tb.new_empty(T, B, H), x_tb.new_empty(B, H), h_tb, steps(3 * H), steps(H)


@torch.library.custom_op("char_gru::gru_backward", mutates_args=(), device_types=("cpu", "cuda"),
                         tags=(torch.Tag.cudagraph_unsafe,))
def gru_backward(dy_tb: Tensor, x_tb: Tensor, W_ih: Tensor, W_hh: Tensor, h_tb: Tensor, gates_tb: Tensor,
                 a_n_tb: Tensor, needs_dx: bool, precision: str
                 ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gru_forward`.

    Shapes: dy_tb (T, B, H), to whose last step the gradient of the last state is added; x_tb (T, B, I); W_ih (3H, I);
    W_hh (3H, H); h_tb, gates_tb, a_n_tb from `gru_forward`; results dx_tb (T, B, I), unless needs_dx (0,); dh0 (B, H),
    dW_ih (3H, I), dW_hh (3H, H), db_ih, db_hh (3H,).
    Raises: ValueError.
    """
    (T, B, _), H = x_tb.shape, W_hh.shape[1]
    with _device_of(x_tb, precision) as (ops, array, tensor):
        kept = {"gates_tb": array(gates_tb), "a_n_tb": array(a_n_tb), "h_tb": array(h_tb)}
        dy, x, W_ih_array, W_hh_array = map(array, (dy_tb, x_tb, W_ih, W_hh))
        saved = ops.gru_saved(T, B, H, x.dtype)._replace(**kept)
        if precision == "bf16" and "h16_tb" in saved._fields:
            saved = saved._replace(h16_tb=array(h_tb[:-1].bfloat16().view(torch.uint16)))
        gradients = gru.backward(dy, x, W_ih_array, W_hh_array, saved, ops, array(_positions(x_tb)), needs_dx=needs_dx)
        found = (x_tb.new_empty(0) if gradient is None else tensor(gradient) for gradient in gradients)
        # Memory of CuPy's arrays is not recorded for other streams, on which gradients may be used.
        return tuple(gradient.clone() if gradient.is_cuda else gradient for gradient in found)


@gru_backward.register_fake
def _(dy_tb, x_tb, W_ih, W_hh, h_tb, gates_tb, a_n_tb, needs_dx, precision):
    H = W_hh.shape[1]
    shapes = x_tb.shape if needs_dx else (0,), h_tb.shape[1:], W_ih.shape, W_hh.shape, (3 * H,), (3 * H,)
    return tuple(x_tb.new_empty(shape) for shape in shapes)


def _keep(ctx, inputs, output) -> None:
    """What the backward pass reads is kept: of the inputs and of the results of `gru_forward`."""
    x_tb, _, W_ih, W_hh, _, _, ctx.precision = inputs
    _, _, *kept = output
    ctx.save_for_backward(x_tb, W_ih, W_hh, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy_tb, dh_last, *_):
    x_tb, W_ih, W_hh, *kept = ctx.saved_tensors
    h_tb = kept[0]
    if dy_tb is None:
        dy_tb = torch.zeros_like(h_tb[1:], memory_format=torch.contiguous_format)
    if dh_last is not None:
        dy_tb = torch.cat([dy_tb[:-1], (dy_tb[-1] + dh_last)[None]])
    needed = ctx.needs_input_grad
    gradients = gru_backward(dy_tb, x_tb, W_ih, W_hh, *kept, needed[0], ctx.precision)
    return *(gradient if needs else None for gradient, needs in zip(gradients, needed)), None


def _no_second_derivative(ctx, *_):
    raise RuntimeError("char-gru's GRU has no second derivative: take torch.nn.GRU where one is needed")


gru_forward.register_autograd(_backward, setup_context=_keep)
gru_backward.register_autograd(_no_second_derivative)
