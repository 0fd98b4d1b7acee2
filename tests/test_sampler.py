"""The Python interface of a trained model: prompts, carried state, streaming, stop strings."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from char_gru.rnn import cpu, sampler
from char_gru.rnn.config import Sizes, UserError
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.params import initial_parameters, named_views
from char_gru.rnn.sampler import CHUNK_NUMBERS, FIRST_CHUNK, LARGEST_CHUNK, Generator
from char_gru.rnn.vocabulary import Vocabulary

CHARACTERS = "\n abcdefgh"


@pytest.fixture(scope="module")
def generator() -> Generator:
    sizes = Sizes(len(CHARACTERS) + 1, 6, 12, layers=2)
    params = named_views(3 * initial_parameters(sizes, "pytorch", 5), sizes)
    return Generator(sizes, Vocabulary(CHARACTERS), params)


class Recorder:
    """The ops of the CPU, with a list of launches and reads: ("launch" or "read", number of the chunk).

    steps holds the steps of each chunk, uniforms the numbers that were given to all of them.
    """

    def __init__(self):
        self.events, self.steps, self.uniforms = [], [], []

    def __getattr__(self, name):
        return getattr(cpu, name)

    def generate(self, params, P, h, ids, forced_tr, uniforms_tr, *others, **options):
        self.events.append(("launch", len(self.steps)))
        self.steps.append(len(forced_tr))
        self.uniforms.extend(uniforms_tr.copy())
        cpu.generate(params, P, h, ids, forced_tr, uniforms_tr, *others, **options)

    def read(self, array):
        chunk, content = len(self.steps) - 1, cpu.read(array)

        def read():
            self.events.append(("read", chunk))
            return content()

        return read


def recorded(generator: Generator) -> tuple[Generator, Recorder]:
    ops = Recorder()
    return Generator(generator.sizes, generator.vocabulary, generator._params, ops), ops


@pytest.fixture
def growing(monkeypatch):
    """Chunks double whatever the time they take."""
    monkeypatch.setattr(sampler, "PAUSE_SECONDS", math.inf)


@pytest.mark.parametrize("length", [1, 2, FIRST_CHUNK, FIRST_CHUNK + 1, 3 * FIRST_CHUNK, 70])
def test_length_is_exact_for_prompts_of_any_length(generator, length):
    prompts = ["", "a", "abc", "h" * FIRST_CHUNK, "h" * 50]
    assert [len(text) for text in generator.generate(prompts, length, seed=1)] == [length] * 5


def test_same_seed_same_text_and_pieces_add_up_to_it(generator):
    texts = generator.generate(["ab", "c"], 100, seed=7)
    assert texts == generator.generate(["ab", "c"], 100, seed=7)
    assert texts != generator.generate(["ab", "c"], 100, seed=8)
    pieces = list(generator.stream(["ab", "c"], 100, seed=7))
    assert ["".join(column) for column in zip(*pieces)] == texts


@pytest.mark.parametrize("first, largest", [(1, 1), (3, 7), (200, 200), (1, 64)])
def test_text_does_not_depend_on_the_chunks(generator, monkeypatch, growing, first, largest):
    prompts = ["ab", "h" * 30, "gfedcba"]
    expected = generator.generate(prompts, 90, seed=7)
    monkeypatch.setattr(sampler, "FIRST_CHUNK", first)
    monkeypatch.setattr(sampler, "LARGEST_CHUNK", largest)
    assert generator.generate(prompts, 90, seed=7) == expected


def test_each_character_is_drawn_with_its_own_number(generator):
    """The k-th character of row b takes number (k, b), wherever the prompts end."""
    writing, ops = recorded(generator)
    prompts, length = ["abc", "h" * 30, "gfedcba"], 50
    writing.generate(prompts, length, seed=7)
    numbers = np.random.Generator(np.random.Philox(key=7)).random((length, len(prompts)), np.float32)
    for row, prompt in enumerate(prompts):
        first = len(prompt) - 1
        np.testing.assert_array_equal(np.array(ops.uniforms)[first:first + length, row], numbers[:, row])


def test_chunks_grow_and_no_step_is_computed_in_vain(generator, growing):
    writing, ops = recorded(generator)
    pieces = list(writing.stream(["ab", "abcd"], 40, seed=1))
    assert ops.steps == [1, 8, 16, 18]  # the prompts' steps that draw nothing, then all that draw
    assert [len(piece) for piece, _ in pieces] == [8, 16, 16]
    assert [len(piece) for _, piece in pieces] == [6, 16, 18]


def test_chunks_are_bounded_in_steps_and_in_numbers(generator, growing):
    writing, ops = recorded(generator)
    writing.generate([""], 4 * LARGEST_CHUNK, seed=1)
    assert max(ops.steps) == LARGEST_CHUNK
    writing, ops = recorded(generator)
    rows = CHUNK_NUMBERS // 16
    next(writing.stream(["a"] * rows, 100, seed=1))
    assert ops.steps == [8, 16]


def test_chunks_that_take_long_grow_no_more(generator, monkeypatch):
    monkeypatch.setattr(sampler, "PAUSE_SECONDS", 0)
    writing, ops = recorded(generator)
    writing.generate([""], 40, seed=1)
    assert ops.steps == [8] * 5


def test_a_chunk_is_launched_before_the_one_before_it_is_read(generator, growing):
    writing, ops = recorded(generator)
    writing.generate([""], 100, seed=1)
    assert ops.events == [("launch", 0), ("launch", 1), ("read", 0), ("launch", 2), ("read", 1), ("launch", 3),
                          ("read", 2), ("read", 3)]


def test_at_most_one_chunk_is_launched_after_the_last_stop_string(generator, growing):
    whole = generator.generate(["", "abc"], 1000, seed=1)
    stop = [text[20:24] for text in whole]
    writing, ops = recorded(generator)
    texts = writing.generate(["", "abc"], 1000, seed=1, stop=stop)
    assert max(map(len, texts)) <= 24 and ops.steps == [8, 16, 32, 64][:len(ops.steps)]
    assert sum(ops.steps[:-1]) < 24 + 2 + ops.steps[-2]


def test_stream_without_end(generator):
    [text] = generator.generate(["ab"], 300, seed=4)
    written = ""
    for [piece] in generator.stream(["ab"], 0, seed=4):
        written += piece
        if len(written) >= 200:
            break
    assert len(written) >= 200 and written[:300] == text[:len(written)]


def test_text_without_length_ends_with_its_stop_string(generator):
    texts = generator.generate(["", "abc"], 500, seed=1, stop=["a"])
    assert all(text.endswith("a") for text in texts)
    assert generator.generate(["", "abc"], 0, seed=1, stop=["a"]) == texts
    with pytest.raises(UserError, match="length or a stop string"):
        generator.generate([""], 0)


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


@pytest.mark.parametrize("chars", [[], ["ab"], [""], ["a", ""], "", "ab", ["a", 3]])
def test_step_takes_one_character_per_row(generator, chars):
    for read in (generator.step, generator.next):
        with pytest.raises(UserError, match="one character per row"):
            read(chars)


def test_a_string_of_one_character_is_a_row(generator):
    assert len(generator.step("a")[0]) == len(generator.next("a")[0]) == 1


def test_state_of_other_rows_is_refused(generator):
    _, state = generator.step(["a"])
    for read in (generator.step, generator.next):
        with pytest.raises(UserError, match=r"state has shape \(2, 1, 12\), but must have \(2, 2, 12\)"):
            read(["a", "b"], state)


def test_state_and_characters_that_are_none_are_refused(generator):
    for read in (generator.step, generator.next):
        for state in ("x", 5, [[0.0]]):
            with pytest.raises(UserError, match="state is .*, but must be an array"):
                read("a", state)
        for chars in (5, None, b"a", [b"a"], "ab", []):
            with pytest.raises(UserError, match="give one character per row"):
                read(chars)


def test_run_that_is_no_path_is_refused():
    for load in (Generator.load, lambda run: LanguageModel.load(run, 2, 2)):
        with pytest.raises(UserError, match="expected the path of a run or a checkpoint, got 5"):
            load(5)


def test_line_ends_and_byte_order_mark_of_a_text_are_those_learnt(generator):
    for text in ("a\r\nb", "\ufeffa\rb"):
        assert generator.generate(text, 20, seed=1) == generator.generate("a\nb", 20, seed=1)
        assert generator.score(text) == generator.score("a\nb")
    known = Vocabulary("a\r\ufeff")
    assert known.as_learnt("\ufeffa\r\na") == "\ufeffa\r\na"


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


def test_a_string_is_one_prompt_and_one_stop_string(generator):
    assert generator.generate("ab cd", 30, seed=1) == generator.generate(["ab cd"], 30, seed=1)
    assert generator.generate("", 30, seed=1) == generator.generate(length=30, seed=1)
    [text] = generator.generate("ab", 100, seed=1)
    assert generator.generate("ab", 100, seed=1, stop=text[40:44]) == [text[:text.index(text[40:44]) + 4]]


# Bytes

@pytest.fixture(scope="module")
def of_bytes() -> Generator:
    """A model of the bytes of a few characters, which mostly writes bytes that are no UTF-8."""
    known = Vocabulary.of("ab\xc3\xa9\xff", of_bytes=True)
    sizes = Sizes(len(known), 5, 12)
    return Generator(sizes, known, named_views(2 * initial_parameters(sizes, "pytorch", 3), sizes))


@pytest.mark.parametrize("stop", [(), ("é", "bbb")])
def test_bytes_are_decoded_as_they_are_written(of_bytes, stop):
    options = {"length": 300, "seed": 1, "stop": stop}
    raw = of_bytes.generate(["", "a", "b"], raw=True, **options)
    assert stop or [len(text) for text in raw] == [300] * 3
    texts = [text.encode("latin-1").decode("utf-8", "replace") for text in raw]
    assert of_bytes.generate(["", "a", "b"], **options) == texts
    assert any("é" in text for text in texts) and (stop or all("\ufffd" in text for text in texts))
    for wanted in stop:
        assert all(text.find(wanted) in (-1, len(text) - len(wanted)) for text in texts)
        assert len(max(raw, key=len)) < 300


def test_prompts_and_stop_strings_of_bytes_may_be_bytes(of_bytes):
    expected = of_bytes.generate("aé", 99, seed=1)
    for prompt in ("aé".encode(), ["aé".encode()], "a\udcc3\udca9"):
        assert of_bytes.generate(prompt, 99, seed=1) == expected
    [raw] = of_bytes.generate("aé", 300, seed=1, raw=True)
    assert of_bytes.generate("aé", 300, seed=1, raw=True, stop=[b"\xa9a"]) == [raw[:raw.index("\xa9a") + 2]]


def test_bytes_are_stepped_through_and_scored_one_by_one(of_bytes):
    chars, state = ["\xc3", "a"], None
    for _ in range(20):
        chars, state = of_bytes.step(chars, state)
        assert all(len(char) == 1 and char in of_bytes.vocabulary.characters for char in chars)
    assert of_bytes.score("aé").characters == 2
    assert of_bytes.score("aé") == of_bytes.score("aé".encode())
    with pytest.raises(UserError, match=r"first known byte is not scored"):
        of_bytes.score(b"\xff")


@pytest.mark.parametrize(("prompts", "options", "part"), [
    ([], {}, "no prompt"), ((), {}, "no prompt"), (None, {}, "prompts: expected a string, got None"),
    (["a", 3], {}, "got 3"), (b"ab", {}, "got bytes; decode"),
    ([b"ab"], {}, "got bytes; decode"),
    ("a", {"stop": ""}, "stop has an empty string"), ("a", {"stop": ["b", ""]}, "stop has an empty string"),
    ("a", {"stop": [None]}, "stop: expected a string, got None"),
    ("a", {"seed": -1}, "seed is -1, but must be"), ("a", {"seed": 2**64}, "must be"), ("a", {"seed": 1.5}, "must be"),
    ("a", {"seed": "1"}, "must be"), ("a", {"length": 2.5}, "must be"), ("a", {"length": "5"}, "must be"),
    ("a", {"top_k": 1.5}, "must be"), ("a", {"temperature": "1"}, "must be"), ("a", {"top_p": None}, "must be"),
    ("a", {"on_unknown": "guess"}, "must be error, skip or unk"),
])
def test_other_input_is_refused_before_anything_is_written(generator, prompts, options, part):
    for write in (generator.generate, generator.stream):
        with pytest.raises(UserError) as caught:
            write(prompts, **options)
        assert part in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_generator_is_refused_that_could_read_beside_its_input_table(generator):
    with pytest.raises(ValueError, match=r"vocabulary: expected 11 characters, \[UNK\] included, got 12"):
        Generator(generator.sizes, Vocabulary(CHARACTERS + "i"), generator._params)
    with pytest.raises(UserError, match="seed is -1"):
        Generator(generator.sizes, generator.vocabulary, generator._params, seed=-1)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1},
                                     {"top_k": -1}, {"min_p": 2}, {"length": -1}])
def test_options_out_of_range_are_refused(generator, options):
    with pytest.raises(UserError, match="must be"):
        generator.generate(["a"], **options)
