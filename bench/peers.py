"""The same training step and the same generation in other libraries, each as its good users would write it.

All start from the same parameters and compute the same numbers, so that a benchmark can verify them before it times
them. Nothing of a library is imported until its peer is made.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from bench.timing import cores
from rnn.config import Sizes
from rnn.model import BETA_1, BETA_2, EPSILON
from rnn.params import checkpoint_name


class Peer(NamedTuple):
    """A model of one layer in another library.

    train_step(inputs_tb, targets_tb, learning_rate) -> loss: one step of Adam, as `LanguageModel.train_step`.
    generate(first_ids, length, temperature) -> ids (length, R): characters that follow the given ones (R,), from a
    zero state; `[UNK]`, id 0, is never drawn; temperature 0 takes the most likely character.
    """

    train_step: Callable[[np.ndarray, np.ndarray, float], float]
    generate: Callable[[np.ndarray, int, float], np.ndarray]


def installed_peers(sizes: Sizes, params: Mapping[str, np.ndarray]) -> dict[str, Peer]:
    """The peers whose libraries are installed, by the library's name; params as `rnn.params.named_views` gives them."""
    return {name: make(sizes, params) for name, (module, make) in PEERS.items() if importlib.util.find_spec(module)}


def pytorch_peer(sizes: Sizes, params: Mapping[str, np.ndarray]) -> Peer:
    """PyTorch: its modules, its Adam (fused, its fastest), and a step of its GRU for each character written."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(cores())
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(sizes.V, sizes.E),
                                 "gru": torch.nn.GRU(sizes.E, sizes.H),
                                 "output": torch.nn.Linear(sizes.H, sizes.V)})
    model.load_state_dict({checkpoint_name(name): torch.tensor(array) for name, array in params.items()})
    optimizer = torch.optim.Adam(model.parameters(), betas=(BETA_1, BETA_2), eps=EPSILON, fused=True)
    [group] = optimizer.param_groups
    step = 0

    def train_step(inputs_tb: np.ndarray, targets_tb: np.ndarray, learning_rate: float) -> float:
        nonlocal step
        step += 1
        group["lr"] = learning_rate
        # PyTorch adds epsilon to the corrected root, Keras and char-gru to the root itself.
        group["eps"] = EPSILON / math.sqrt(1 - BETA_2**step)
        ids_tb, targets_tb = (torch.tensor(ids_tb, dtype=torch.long) for ids_tb in (inputs_tb, targets_tb))
        h_tb, _ = model["gru"](model["embedding"](ids_tb))
        loss = functional.cross_entropy(model["output"](h_tb).flatten(0, 1), targets_tb.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.inference_mode()
    def generate(first_ids: np.ndarray, length: int, temperature: float) -> np.ndarray:
        ids, h = torch.tensor(first_ids, dtype=torch.long), None
        ids_tr = torch.empty((length, len(first_ids)), dtype=torch.long)
        for t in range(length):
            y, h = model["gru"](model["embedding"](ids)[None], h)
            logits = model["output"](y[0])
            logits[:, 0] = -math.inf
            if temperature == 0:
                ids = logits.argmax(dim=1)
            else:
                ids = torch.multinomial(torch.softmax(logits / temperature, dim=1), 1)[:, 0]
            ids_tr[t] = ids
        return ids_tr.numpy()

    return Peer(train_step, generate)


def jax_peer(sizes: Sizes, params: Mapping[str, np.ndarray]) -> Peer:
    """JAX: a compiled step with the input products of all positions in one, and a compiled loop over the characters."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    cpu = jax.devices("cpu")[0]
    named = {name.removesuffix(".0"): array for name, array in params.items()}
    training = {"params": named, "m": jax.tree.map(np.zeros_like, named), "v": jax.tree.map(np.zeros_like, named)}
    training = jax.device_put(training, cpu)
    step = 0
    uniform_source = np.random.default_rng(0)

    def gru_step(params, h, i):
        i_r, i_z, i_n = jnp.split(i, 3, axis=1)
        # Added gate by gate: XLA takes much longer over a product of one row with a bias right behind it.
        a_r, a_z, a_n = (a + b for a, b in zip(jnp.split(h @ params["W_hh"].T, 3, axis=1), jnp.split(params["b_hh"], 3)))
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

    def train_step(inputs_tb: np.ndarray, targets_tb: np.ndarray, learning_rate: float) -> float:
        nonlocal training, step
        step += 1
        step_size = learning_rate * math.sqrt(1 - BETA_2**step) / (1 - BETA_1**step)
        training, loss = compiled_step(training, inputs_tb, targets_tb, step_size)
        return jax.block_until_ready((training, loss))[1].item()

    def generate(first_ids: np.ndarray, length: int, temperature: float) -> np.ndarray:
        uniforms_tr = uniform_source.random((length, len(first_ids)), np.float32)
        greedy = temperature == 0
        return np.asarray(compiled_generate(training["params"], first_ids, uniforms_tr, temperature, greedy))

    return Peer(train_step, generate)


PEERS = {"PyTorch": ("torch", pytorch_peer), "JAX": ("jax", jax_peer)}
"""Each peer's module, and the function that makes it."""
