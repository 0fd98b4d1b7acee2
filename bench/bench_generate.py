"""Writing 1,000 characters with the tutorial's model, one text and several at once."""

from __future__ import annotations

import numpy as np

from bench import tutorial
from bench.peers import Peer, installed_peers
from bench.timing import interleave
from rnn.params import named_views
from rnn.sampler import Generator

ROWS = (1, 5, 64)

LENGTH = 1000

TEMPERATURE = 1.0

PARAMETER_SCALE = np.float32(2)
"""Initial parameters as they are soon write one character for ever; verified texts should vary."""


def test_generation(publish, rounds):
    sizes = tutorial.SIZES
    params = named_views(PARAMETER_SCALE * tutorial.flat_params(), sizes)
    ours = Generator(sizes, tutorial.VOCABULARY, params)
    peers = installed_peers(sizes, params)
    seconds = {}
    for rows in ROWS:
        prompts = tutorial.CHARACTERS[:rows]

        def candidates(temperature: float) -> dict:
            return {"char-gru": lambda: ours.generate(prompts, LENGTH, temperature=temperature, seed=0),
                    **{name: lambda peer=peer: texts(peer, prompts, temperature) for name, peer in peers.items()}}

        greedy = {name: candidate() for name, candidate in candidates(temperature=0).items()}
        assert all(written == greedy["char-gru"] for written in greedy.values())
        seconds[str(rows)] = interleave(candidates(TEMPERATURE), rounds)
    publish("generate", {"length": LENGTH, "V": sizes.V, "E": sizes.E, "H": sizes.H}, {"seconds_by_rows": seconds})


def texts(peer: Peer, prompts: str, temperature: float) -> list[str]:
    """What a peer writes after each of some prompts of one character."""
    first_ids = tutorial.VOCABULARY.encode(prompts).astype(np.int32)
    return [tutorial.VOCABULARY.decode(ids) for ids in peer.generate(first_ids, LENGTH, temperature).T]
