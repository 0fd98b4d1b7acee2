"""The same training step and the same generation in other libraries, each as its good users would write it.

All start from the same parameters and compute the same numbers, so that a benchmark can verify them before it times
them. Nothing of a library is imported until its peer is made.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, SupportsFloat

import numpy as np

from bench.devices import Device
from bench.implementations import Torch, installed
from rnn.config import Sizes
from rnn.model import BETA_1, BETA_2, EPSILON
from rnn.params import checkpoint_name

WARM_UP_STEPS = 3
"""Before PyTorch records a graph, as its documentation asks."""

JAX_PRECISIONS = {"fp32": "float32", "tf32": "tensorfloat32", "bf16": "bfloat16"}


class Peer(NamedTuple):
    """A model of one layer in another library.

    train_step(inputs_tb, targets_tb, learning_rate) -> loss: one step of Adam, as `LanguageModel.train_step`.
    generate(first_ids, length, temperature) -> ids (length, R): characters that follow the given ones (R,), from a
    zero state; `[UNK]`, id 0, is never drawn; temperature 0 takes the most likely character. None where a library's
    user would write the loop in another one.
    loss(inputs_tb, targets_tb) -> loss: without training.
    """

    train_step: Callable[[np.ndarray, np.ndarray, float], SupportsFloat]
    generate: Callable[[np.ndarray, int, float], np.ndarray] | None
    loss: Callable[[np.ndarray, np.ndarray], SupportsFloat]


class Maker(NamedTuple):
    """A peer that can be made: its name, precision, make(sizes, params) with params as `rnn.params.named_views` gives
    them, and whether it writes text."""

    name: str
    precision: str
    make: Callable[[Sizes, Mapping[str, np.ndarray]], Peer]
    generates: bool


def installed_peers(device: Device) -> Iterator[Maker]:
    """The peers whose libraries are installed, in the precisions of the device; Keras on the CPU, where it has the same
    precision as the others."""
    with_torch, with_jax = (installed(library, device.kind) for library in ("torch", "jax"))
    for precision in device.precisions:
        suffix = "" if device.kind == "cpu" else f" {precision}"
        if with_torch:
            for name, mode in TORCH_MODES.items():
                if mode == "eager" or mode == ("graph" if device.kind == "cuda" else "compiled") or (
                        mode == "compiled" and precision == "tf32"):  # on a GPU once: it compiles for a minute
                    yield Maker(name + suffix, precision,
                                lambda *model, mode=mode, precision=precision: pytorch_peer(
                                    *model, Torch(device, precision), mode), mode == "eager")
        if with_jax:
            yield Maker(f"JAX{suffix}", precision,
                        functools.partial(jax_peer, device=device.kind, precision=precision), True)
    if importlib.util.find_spec("keras") and device.kind == "cpu":
        yield Maker("Keras", "fp32", keras_peer, False)


TORCH_MODES = {"PyTorch": "eager", "PyTorch compiled": "compiled", "PyTorch graph": "graph"}
"""PyTorch as it is; its forward pass and loss through torch.compile; a whole step recorded in a CUDA graph."""


def pytorch_peer(sizes: Sizes, params: Mapping[str, np.ndarray], library: Torch, mode: str = "eager") -> Peer:
    """PyTorch: its modules, its Adam (fused, its fastest), and a step of its GRU for each character written."""
    torch, functional = library.torch, library.torch.nn.functional
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(sizes.V, sizes.E),
                                 "gru": torch.nn.GRU(sizes.E, sizes.H),
                                 "output": torch.nn.Linear(sizes.H, sizes.V)}).to(library.kind)
    model.load_state_dict({checkpoint_name(name): torch.tensor(array) for name, array in params.items()})
    rate = torch.tensor(0.0, device=library.kind) if mode == "graph" else 0.0
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(BETA_1, BETA_2), eps=EPSILON, fused=True,
                                 capturable=mode == "graph")
    [group] = optimizer.param_groups
    step, graph, static = 0, None, None

    def ids_of(*arrays: np.ndarray) -> list:
        return [torch.tensor(ids_tb, dtype=torch.long, device=library.kind) for ids_tb in arrays]

    def mean_loss(ids_tb, targets_tb):
        h_tb, _ = model["gru"](model["embedding"](ids_tb))
        return functional.cross_entropy(model["output"](h_tb).flatten(0, 1), targets_tb.flatten())

    if mode == "compiled":
        mean_loss = torch.compile(mean_loss)

    def one_step(ids_tb, targets_tb):
        optimizer.zero_grad()
        loss = mean_loss(ids_tb, targets_tb)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def train_step(inputs_tb: np.ndarray, targets_tb: np.ndarray, learning_rate: float) -> Any:
        nonlocal step
        step += 1
        batch = ids_of(inputs_tb, targets_tb)
        with library.switched():
            if mode == "graph":
                rate.fill_(learning_rate)
                return graph_step(batch)
            group["lr"] = learning_rate
            # PyTorch adds epsilon to the corrected root, Keras and char-gru to the root itself.
            group["eps"] = EPSILON / math.sqrt(1 - BETA_2**step)
            return one_step(*batch)

    def graph_step(batch: list):
        """The first steps as they are, all later ones a replay of the one that was recorded."""
        nonlocal graph, static
        if graph is None and step <= WARM_UP_STEPS:
            return one_step(*batch)
        if graph is None:
            static = batch
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                static.append(one_step(*batch))
        for fixed, ids_tb in zip(static, batch):
            fixed.copy_(ids_tb)
        graph.replay()
        return static[2]

    @torch.no_grad()
    def loss(inputs_tb: np.ndarray, targets_tb: np.ndarray) -> Any:
        with library.switched():
            return mean_loss(*ids_of(inputs_tb, targets_tb))

    @torch.inference_mode()
    def generate(first_ids: np.ndarray, length: int, temperature: float) -> np.ndarray:
        ids, h = torch.tensor(first_ids, dtype=torch.long, device=library.kind), None
        ids_tr = torch.empty((length, len(first_ids)), dtype=torch.long, device=library.kind)
        with library.switched():
            for t in range(length):
                y, h = model["gru"](model["embedding"](ids)[None], h)
                logits = model["output"](y[0]).float()
                logits[:, 0] = -math.inf
                if temperature == 0:
                    ids = logits.argmax(dim=1)
                else:
                    ids = torch.multinomial(torch.softmax(logits / temperature, dim=1), 1)[:, 0]
                ids_tr[t] = ids
        return ids_tr.cpu().numpy()

    return Peer(train_step, generate if mode == "eager" else None, loss)


def jax_peer(sizes: Sizes, params: Mapping[str, np.ndarray], device: str = "cpu", precision: str = "fp32") -> Peer:
    """JAX: a compiled step with the input products of all positions in one, and a compiled loop over the characters."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes most of a GPU at once
    import jax
    from jax import lax
    from jax import numpy as jnp

    place = jax.devices(device)[0]
    named = {name.removesuffix(".0"): array for name, array in params.items()}
    training = {"params": named, "m": jax.tree.map(np.zeros_like, named), "v": jax.tree.map(np.zeros_like, named)}
    training = jax.device_put(training, place)
    step = 0
    uniform_source = np.random.default_rng(0)

    def gru_step(params, h, i):
        i_r, i_z, i_n = jnp.split(i, 3, axis=1)
        # Added gate by gate: XLA takes much longer over a product of one row with a bias right behind it.
        products = zip(jnp.split(h @ params["W_hh"].T, 3, axis=1), jnp.split(params["b_hh"], 3))
        a_r, a_z, a_n = (a + b for a, b in products)
        r, z = jax.nn.sigmoid(i_r + a_r), jax.nn.sigmoid(i_z + a_z)
        n = jnp.tanh(i_n + r * a_n)
        return n + z * (h - n)

    def mean_loss(params, ids_tb, targets_tb):
        def next_state(h, i):
            h = gru_step(params, h, i)
            return h, h

        i_tb = params["W_emb"][ids_tb] @ params["W_ih"].T + params["b_ih"]
        _, h_tb = lax.scan(next_state, jnp.zeros((ids_tb.shape[1], sizes.H)), i_tb)
        log_p_tb = jax.nn.log_softmax(h_tb @ params["W_out"].T + params["b_out"])
        return -jnp.mean(jnp.take_along_axis(log_p_tb, targets_tb[..., None], axis=2))

    def compiled_step(training, ids_tb, targets_tb, step_size):
        loss, grads = jax.value_and_grad(mean_loss)(training["params"], ids_tb, targets_tb)
        m = jax.tree.map(lambda m, g: BETA_1 * m + (1 - BETA_1) * g, training["m"], grads)
        v = jax.tree.map(lambda v, g: BETA_2 * v + (1 - BETA_2) * g * g, training["v"], grads)
        params = jax.tree.map(lambda p, m, v: p - step_size * m / (jnp.sqrt(v) + EPSILON), training["params"], m, v)
        return {"params": params, "m": m, "v": v}, loss

    def compiled_generate(params, first_ids, uniforms_tr, temperature, greedy):
        P = params["W_emb"] @ params["W_ih"].T + params["b_ih"]

        def next_ids(state, uniforms):
            h, ids = state
            h = gru_step(params, h, P[ids])
            known = (h @ params["W_out"].T + params["b_out"])[:, 1:]
            if greedy:
                ids = 1 + jnp.argmax(known, axis=1)
            else:
                cumulative = jnp.cumsum(jax.nn.softmax(known / temperature), axis=1)
                passed = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(axis=1)
                ids = jnp.minimum(1 + passed, sizes.V - 1)
            return (h, ids), ids

        _, ids_tr = lax.scan(next_ids, (jnp.zeros((len(first_ids), sizes.H)), first_ids), uniforms_tr)
        return ids_tr

    compiled_step = jax.jit(compiled_step, donate_argnums=0)
    compiled_generate = jax.jit(compiled_generate, static_argnames="greedy")

    def train_step(inputs_tb: np.ndarray, targets_tb: np.ndarray, learning_rate: float) -> Any:
        nonlocal training, step
        step += 1
        step_size = learning_rate * math.sqrt(1 - BETA_2**step) / (1 - BETA_1**step)
        with jax.default_matmul_precision(JAX_PRECISIONS[precision]):
            training, loss = compiled_step(training, inputs_tb, targets_tb, step_size)
        return jax.block_until_ready((training, loss))[1]

    def generate(first_ids: np.ndarray, length: int, temperature: float) -> np.ndarray:
        uniforms_tr = uniform_source.random((length, len(first_ids)), np.float32)
        greedy = temperature == 0
        with jax.default_matmul_precision(JAX_PRECISIONS[precision]):
            return np.asarray(compiled_generate(training["params"], first_ids, uniforms_tr, temperature, greedy))

    compiled_loss = jax.jit(mean_loss)

    def loss(inputs_tb: np.ndarray, targets_tb: np.ndarray) -> Any:
        with jax.default_matmul_precision(JAX_PRECISIONS[precision]):
            return compiled_loss(training["params"], inputs_tb, targets_tb)

    return Peer(train_step, generate, loss)


def keras_peer(sizes: Sizes, params: Mapping[str, np.ndarray]) -> Peer:
    """Keras on JAX, or on the backend that KERAS_BACKEND names: the tutorial's layers, its Adam, `train_on_batch`."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    layers = keras.layers
    model = keras.Sequential([layers.Embedding(sizes.V, sizes.E), layers.GRU(sizes.H, return_sequences=True),
                              layers.Dense(sizes.V)])
    model.build((None, None))

    def gates_zrn(array: np.ndarray) -> np.ndarray:
        r, z, n = np.split(array, 3)
        return np.concatenate([z, r, n])

    weights = {name: gates_zrn(params[f"{name}.0"]) for name in ("W_ih", "W_hh", "b_ih", "b_hh")}
    model.set_weights([params["W_emb"], weights["W_ih"].T, weights["W_hh"].T,
                       np.stack([weights["b_ih"], weights["b_hh"]]), params["W_out"].T, params["b_out"]])
    optimizer = keras.optimizers.Adam(beta_1=BETA_1, beta_2=BETA_2, epsilon=EPSILON)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def train_step(inputs_tb: np.ndarray, targets_tb: np.ndarray, learning_rate: float) -> float:
        optimizer.learning_rate = learning_rate
        return model.train_on_batch(inputs_tb.T, targets_tb.T)

    return Peer(train_step, None, lambda inputs_tb, targets_tb: model.test_on_batch(inputs_tb.T, targets_tb.T))
