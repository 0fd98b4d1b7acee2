"""The Python interface of generation: prompts, carried state, streaming, stop strings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnn.config import Sizes, UserError
from rnn.params import initial_parameters, named_views
from rnn.sampler import CHUNK, Generator
from rnn.vocabulary import Vocabulary

CHARACTERS = "\n abcdefgh"


@pytest.fixture(scope="module")
def generator() -> Generator:
    sizes = Sizes(len(CHARACTERS) + 1, 6, 12, layers=2)
    params = named_views(3 * initial_parameters(sizes, "pytorch", 5), sizes)
    return Generator(sizes, Vocabulary(CHARACTERS), params)


def test_length_is_exact_for_prompts_of_any_length(generator):
    prompts = ["", "a", "abc", "h" * (CHUNK + 3)]
    for length in (1, 2, CHUNK, 2 * CHUNK + 1):
        assert [len(text) for text in generator.generate(prompts, length, seed=1)] == [length] * 4


def test_same_seed_same_text_and_pieces_add_up_to_it(generator):
    texts = generator.generate(["ab", "c"], 100, seed=7)
    assert texts == generator.generate(["ab", "c"], 100, seed=7)
    assert texts != generator.generate(["ab", "c"], 100, seed=8)
    pieces = list(generator.stream(["ab", "c"], 100, seed=7))
    assert ["".join(column) for column in zip(*pieces)] == texts
    assert len(pieces) == -(-101 // CHUNK)


def test_a_row_does_not_depend_on_the_prompts_beside_it(generator):
    alone, _ = generator.generate(["ab", "cd"], 50, seed=3)
    beside_longer, _ = generator.generate(["ab", "hgfedcbahgfedcba"], 50, seed=3)
    assert alone == beside_longer


def test_step_continues_as_generate_does_at_temperature_zero(generator):
    [text] = generator.generate(["abc"], 20, temperature=0)
    state, chars = None, []
    for char in "abc":
        [following], state = generator.step([char], state, temperature=0)
    for _ in range(20):
        chars.append(following)
        [following], state = generator.step([following], state, temperature=0)
    assert "".join(chars) == text


def test_step_leaves_the_state_it_was_given(generator):
    _, state = generator.step(["a", "b"])
    kept = state.copy()
    generator.step(["c", "d"], state)
    np.testing.assert_array_equal(state, kept)


def test_step_draws_the_same_characters_from_the_same_seed(generator):
    def drawn(seed: int) -> str:
        fresh = Generator(generator.sizes, generator.vocabulary, generator._params, seed=seed)
        chars, state, text = ["a"], None, ""
        for _ in range(30):
            chars, state = fresh.step(chars, state)
            text += chars[0]
        return text

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("chars", [[], ["ab"], [""], ["a", ""]])
def test_step_takes_one_character_per_row(generator, chars):
    with pytest.raises(UserError, match="one character per row"):
        generator.step(chars)


@given(st.lists(st.text(CHARACTERS, min_size=1, max_size=3), min_size=1, max_size=2), st.integers(0, 1000))
def test_text_ends_with_the_first_stop_string(stop, seed):
    generator = STOP_GENERATOR
    whole = generator.generate(["", "abc"], 80, seed=seed)
    stopped = generator.generate(["", "abc"], 80, seed=seed, stop=stop)
    for text, ended in zip(whole, stopped):
        ends = [text.index(wanted) + len(wanted) for wanted in stop if wanted in text]
        assert ended == text[:min(ends, default=len(text))]


STOP_GENERATOR = Generator(
    Sizes(len(CHARACTERS) + 1, 4, 5), Vocabulary(CHARACTERS),
    named_views(initial_parameters(Sizes(len(CHARACTERS) + 1, 4, 5), "pytorch", 1), Sizes(len(CHARACTERS) + 1, 4, 5)))


def test_unknown_characters_are_shown_skipped_or_read_as_unk(generator):
    with pytest.raises(UserError, match=r"'X' 'ß'"):
        generator.generate(["aXbß"], 5)
    assert generator.generate(["aXb"], 30, seed=1, on_unknown="skip") == generator.generate(["ab"], 30, seed=1)
    texts = generator.generate(["aXb", "ab"], 30, seed=1, on_unknown="unk")
    assert len(texts[0]) == 30 and "\ufffd" not in texts[0]


def test_filters_reach_the_sampling(generator):
    greedy = generator.generate(["abc"], 40, temperature=0)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}):
        assert generator.generate(["abc"], 40, seed=2, **options) == greedy
    assert generator.generate(["abc"], 40, seed=2) != greedy


@pytest.mark.parametrize("options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1},
                                     {"top_k": -1}, {"min_p": 2}])
def test_options_out_of_range_are_refused(generator, options):
    with pytest.raises(UserError, match="must be"):
        generator.generate(["a"], 5, **options)
