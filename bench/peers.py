"""The same training step and the same generation in other libraries, each as an experienced user would write it.

All peers start from the same parameters and compute the same numbers, so that a benchmark can verify a peer before it
times the peer. Nothing of a library is imported until its peer is made.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat

import numpy as np

from bench.devices import Device
from bench.implementations import Torch, flashrnn_gru, imported_jax, installed
from char_gru.rnn.checkpoint import Checkpoint
from char_gru.rnn.config import Sizes
from char_gru.rnn.model import BETA_1, BETA_2, EPSILON
from char_gru.rnn.params import checkpoint_name
from char_gru.rnn.vocabulary import Vocabulary

JAX_PRECISIONS = {"fp32": "float32", "tf32": "tensorfloat32", "bf16": "bfloat16"}

CORRECTED_STEP = 1e6
"""The step at which PyTorch's Adam starts, so that its bias corrections are 1: PyTorch adds epsilon to the root of the
corrected moment; Keras and char-gru add epsilon to the root of the moment and correct the learning rate."""


class Peer(NamedTuple):
    """A model of one layer in another library.

    train_step(inputs_tb, targets_tb, learning_rate) -> loss: one step of Adam, as `LanguageModel.train_step`.
    generate(first_ids, length, temperature) -> ids (length, R): characters that follow the given ones (R,), from a
    zero state; `[UNK]`, id 0, is never drawn; temperature 0 takes the most likely character.
    loss(inputs_tb, targets_tb) -> loss: without training.
    """

    train_step: Callable[[np.ndarray, np.ndarray, float], SupportsFloat]
    generate: Callable[[np.ndarray, int, float], np.ndarray]
    loss: Callable[[np.ndarray, np.ndarray], SupportsFloat]


class Maker(NamedTuple):
    """A peer that can be made: its name, precision, and make(sizes, params), params as `rnn.params.named_views` gives
    them."""

    name: str
    precision: str
    make: Callable[[Sizes, Mapping[str, np.ndarray]], Peer]


def training_peers(device: Device, tutorial: bool) -> Iterator[Maker]:
    """The peers that train on a device, in each of its precisions, at the tutorial's sizes or others. On a GPU, peers
    that compile for long are measured at the tutorial's sizes only, and in tf32, the default of most libraries there;
    FlashRNN, which has no tf32, in fp32 and bf16."""
    if device.kind == "cpu":
        return _installed(device, dict.fromkeys(("PyTorch", "PyTorch compiled", "JAX", "Keras"), device.precisions))
    precisions = dict.fromkeys(("PyTorch", "PyTorch graph", "JAX"), device.precisions)
    if tutorial:
        precisions |= {"PyTorch compiled": ("tf32",), "Keras": ("tf32",), "PyTorch FlashRNN": ("fp32", "bf16")}
    return _installed(device, precisions)


def writing_peers(device: Device) -> Iterator[Maker]:
    """The peers that write text on a device, in float32."""
    of_device = () if device.kind == "cpu" else ("PyTorch graph",)
    return _installed(device, dict.fromkeys(("PyTorch", "PyTorch compiled", *of_device, "JAX", "Keras"), ("fp32",)))


def _installed(device: Device, precisions: Mapping[str, Sequence[str]]) -> Iterator[Maker]:
    for precision in device.precisions:
        for name, (library, peer) in PEERS.items():
            if precision in precisions.get(name, ()) and installed(library, device.kind):
                yield Maker(name if device.kind == "cpu" else f"{name} {precision}", precision,
                            functools.partial(peer, device=device, precision=precision))


def corrected(learning_rate: float, step: int) -> float:
    """The learning rate of a step, counted from 1, corrected for moments that started at zero."""
    return learning_rate * math.sqrt(1 - BETA_2**step) / (1 - BETA_1**step)


def pytorch_peer(sizes: Sizes, params: Mapping[str, np.ndarray], device: Device, precision: str,
                 mode: str = "eager") -> Peer:
    """PyTorch: its modules, its Adam (fused, its fastest), and a step of its GRU for each character written.

    mode: eager, as it is; compiled, the forward pass and the loss, and the step of a character, through torch.compile;
    graph, a whole training step, or the step of a character with drawing it, recorded in a CUDA graph; flashrnn, eager
    with FlashRNN's GRU.
    """
    library = Torch(device, precision)
    torch, functional = library.torch, library.torch.nn.functional
    model, optimizer, rate = _pytorch_model(library, sizes, params, mode)
    [group] = optimizer.param_groups
    step = 0

    def ids_of(*arrays: np.ndarray) -> list:
        return [torch.tensor(ids_tb, dtype=torch.long, device=library.kind) for ids_tb in arrays]

    def mean_loss(ids_tb, targets_tb):
        h_tb, _ = model["gru"](model["embedding"](ids_tb))
        return functional.cross_entropy(model["output"](h_tb).flatten(0, 1), targets_tb.flatten())

    def next_ids(ids, h, temperature: float):
        y, h = model["gru"](model["embedding"](ids)[None], h)
        logits = model["output"](y[0]).float()
        logits[:, 0] = -math.inf
        if temperature == 0:
            return logits.argmax(dim=1), h
        p = torch.softmax(logits / temperature, dim=1)
        # As torch.multinomial draws, without its check of p.
        return (p / torch.empty_like(p).exponential_()).argmax(dim=1), h

    if mode == "compiled":
        torch.compiler.reset()  # otherwise it compiles for variable sizes from the second size on, or gives up
        mean_loss, next_ids = torch.compile(mean_loss), torch.compile(next_ids)

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
        step_size = corrected(learning_rate, step)
        with library.switched():
            if mode == "graph":
                fixed_ids_tb, fixed_targets_tb, fixed_loss, train = recorded_step(*inputs_tb.shape)
                for fixed, value in zip((fixed_ids_tb, fixed_targets_tb), batch):
                    fixed.copy_(value)
                rate.fill_(step_size)
                train()
                return fixed_loss
            group["lr"] = step_size
            return one_step(*batch)

    @functools.cache
    def recorded_step(T: int, B: int):
        """Ids, targets and loss of a step, and the function that makes the step."""
        ids_tb, targets_tb = (torch.empty((T, B), dtype=torch.long, device=library.kind) for _ in range(2))
        loss = torch.empty((), device=library.kind)
        return ids_tb, targets_tb, loss, library.replayable(lambda: loss.copy_(one_step(ids_tb, targets_tb)))

    @torch.no_grad()
    def loss(inputs_tb: np.ndarray, targets_tb: np.ndarray) -> Any:
        with library.switched():
            return mean_loss(*ids_of(inputs_tb, targets_tb))

    @torch.inference_mode()
    def generate(first_ids: np.ndarray, length: int, temperature: float) -> np.ndarray:
        [ids], h = ids_of(first_ids), torch.zeros((1, len(first_ids), sizes.H), device=library.kind)
        ids_tr = torch.empty((length, len(first_ids)), dtype=torch.long, device=library.kind)
        with library.switched():
            if mode == "graph":
                fixed_ids, fixed_h, move_on = recorded_next_ids(len(first_ids), temperature)
                fixed_ids.copy_(ids)
                fixed_h.copy_(h)
            for ids_r in ids_tr:
                if mode == "graph":
                    move_on()
                    ids_r.copy_(fixed_ids)
                else:
                    ids, h = next_ids(ids, h, temperature)
                    ids_r.copy_(ids)
        return ids_tr.cpu().numpy()

    @functools.cache
    def recorded_next_ids(R: int, temperature: float):
        """Ids and states, and the function that moves both on by a character."""
        ids = torch.empty((R,), dtype=torch.long, device=library.kind)
        h = torch.empty((1, R, sizes.H), device=library.kind)

        def move_on() -> None:
            for fixed, moved in zip((ids, h), next_ids(ids, h, temperature)):
                fixed.copy_(moved)

        return ids, h, library.replayable(move_on)

    return Peer(train_step, generate, loss)


def _pytorch_model(library: Torch, sizes: Sizes, params: Mapping[str, np.ndarray], mode: str) -> tuple:
    """Modules with the given parameters, their Adam, and the learning rate as the tensor that a graph reads."""
    torch = library.torch
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(sizes.V, sizes.E),
                                 "gru": torch.nn.GRU(sizes.E, sizes.H),
                                 "output": torch.nn.Linear(sizes.H, sizes.V)})
    model.load_state_dict({checkpoint_name(name): torch.tensor(array) for name, array in params.items()})
    if mode == "flashrnn":
        model["gru"] = flashrnn_gru(library, model["gru"])
    model.to(library.kind)
    rate = torch.tensor(0.0, device=library.kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate if mode == "graph" else 0.0, betas=(BETA_1, BETA_2),
                                 eps=EPSILON, fused=True, capturable=mode == "graph")
    for param in model.parameters():
        optimizer.state[param] = {"step": torch.tensor(CORRECTED_STEP, device=library.kind),
                                  "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
    return model, optimizer, rate


def jax_peer(sizes: Sizes, params: Mapping[str, np.ndarray], device: Device, precision: str) -> Peer:
    """JAX: a compiled step with the input products of all positions in one, and a compiled loop over the characters."""
    jax = imported_jax()
    from jax import lax
    from jax import numpy as jnp

    place = jax.devices(device.kind)[0]
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
        step_size = corrected(learning_rate, step)
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


def keras_peer(sizes: Sizes, params: Mapping[str, np.ndarray], device: Device, precision: str) -> Peer:
    """Keras on JAX: the tutorial's layers, its Adam, `train_on_batch`, and the tutorial's way of writing: a compiled
    model of one step, called once for each character."""
    os.environ["KERAS_BACKEND"] = "jax"
    jax = imported_jax()
    import keras

    layers = keras.layers
    keras.config.set_dtype_policy("float32")

    @contextlib.contextmanager
    def switched() -> Iterator[None]:
        """Inside the `with` block, Keras computes on this device and multiplies in this precision."""
        with jax.default_device(jax.devices(device.kind)[0]), jax.default_matmul_precision(JAX_PRECISIONS[precision]):
            yield

    def gates_zrn(array: np.ndarray) -> np.ndarray:
        r, z, n = np.split(array, 3)
        return np.concatenate([z, r, n])

    with switched():
        embedding, output = layers.Embedding(sizes.V, sizes.E), layers.Dense(sizes.V)
        gru = layers.GRU(sizes.H, return_sequences=True, return_state=True)
        ids_bt, h_b = keras.Input((None,), dtype="int32"), keras.Input((sizes.H,))
        h_bt, _ = gru(embedding(ids_bt))
        model = keras.Model(ids_bt, output(h_bt))
        weights = {name: gates_zrn(params[f"{name}.0"]) for name in ("W_ih", "W_hh", "b_ih", "b_hh")}
        model.set_weights([params["W_emb"], weights["W_ih"].T, weights["W_hh"].T,
                           np.stack([weights["b_ih"], weights["b_hh"]]), params["W_out"].T, params["b_out"]])
        optimizer = keras.optimizers.Adam(beta_1=BETA_1, beta_2=BETA_2, epsilon=EPSILON)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    mask = np.where(np.arange(sizes.V) == 0, -np.inf, 0).astype(np.float32)

    class Draw(layers.Layer):
        """From logits (R, V) to ids (R, 1)."""

        def __init__(self, temperature: float) -> None:
            super().__init__()
            self.temperature, self.seeds = temperature, keras.random.SeedGenerator(0)

        def call(self, logits):
            logits += mask
            if self.temperature == 0:
                return keras.ops.argmax(logits, axis=1, keepdims=True)
            return keras.random.categorical(logits / self.temperature, 1, seed=self.seeds)

    @functools.cache
    def one_step(temperature: float):
        """The model of one step, from ids (R, 1) and states (R, H) to ids and states of the next character; and the
        compiled call of this model: with `predict_on_batch`, a step takes nearly twice as long."""
        y_bt, h_next_b = gru(embedding(ids_bt), initial_state=h_b)
        step_model = keras.Model([ids_bt, h_b], [Draw(temperature)(output(y_bt[:, -1])), h_next_b])
        return step_model, jax.jit(step_model.stateless_call)

    def train_step(inputs_tb: np.ndarray, targets_tb: np.ndarray, learning_rate: float) -> float:
        with switched():
            optimizer.learning_rate = learning_rate
            return model.train_on_batch(inputs_tb.T, targets_tb.T)

    def generate(first_ids: np.ndarray, length: int, temperature: float) -> np.ndarray:
        ids, h = first_ids[:, None], np.zeros((len(first_ids), sizes.H), np.float32)
        ids_tr = []
        with switched():
            step_model, step = one_step(temperature)
            trained, others = ([variable.value for variable in variables] for variables in
                               (step_model.trainable_variables, step_model.non_trainable_variables))
            for _ in range(length):
                (ids, h), others = step(trained, others, [ids, h])
                ids_tr.append(ids)
        return np.concatenate([np.asarray(ids) for ids in ids_tr], axis=1).T

    def loss(inputs_tb: np.ndarray, targets_tb: np.ndarray) -> float:
        with switched():
            return model.test_on_batch(inputs_tb.T, targets_tb.T)

    return Peer(train_step, generate, loss)


def onnxruntime_generate(sizes: Sizes,
                         params: Mapping[str, np.ndarray]) -> Callable[[np.ndarray, int, float], np.ndarray]:
    """onnxruntime on the CPU, with the model's ONNX file: the `generate` of a `Peer`. It does not train."""
    import onnxruntime

    from char_gru.rnn.export.onnx_graph import onnx_bytes

    checkpoint = Checkpoint(sizes, Vocabulary("".join(map(chr, range(1, sizes.V)))), dict(params))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that inputs with default values are no constants
    session = onnxruntime.InferenceSession(onnx_bytes(checkpoint, logits=False), options, ["CPUExecutionProvider"])
    uniform_source = np.random.default_rng(0)

    def generate(first_ids: np.ndarray, length: int, temperature: float) -> np.ndarray:
        shape = (length, len(first_ids))
        [ids_tr] = session.run(["ids_tr"], {
            "ids": first_ids, "state": np.zeros((sizes.layers, len(first_ids), sizes.H), np.float32),
            "forced_tr": np.full(shape, -1, np.int32), "uniforms_tr": uniform_source.random(shape, np.float32),
            "temperature": np.array(temperature, np.float32)})
        return ids_tr

    return generate


PEERS: Mapping[str, tuple[str, Callable[..., Peer]]] = {
    "PyTorch": ("torch", pytorch_peer), "PyTorch compiled": ("torch", functools.partial(pytorch_peer, mode="compiled")),
    "PyTorch graph": ("torch", functools.partial(pytorch_peer, mode="graph")),
    "PyTorch FlashRNN": ("flashrnn", functools.partial(pytorch_peer, mode="flashrnn")),
    "JAX": ("jax", jax_peer), "Keras": ("keras", keras_peer)}
"""Name -> the library that has to be installed, and the function that makes the peer."""
