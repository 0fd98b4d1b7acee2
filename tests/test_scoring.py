"""Scores of texts: in one row or in many, together or alone, they are those of the text read from its start."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.rnn import cpu, reference, reference_ops, scoring
from char_gru.rnn.batches import validation_windows
from char_gru.rnn.config import Sizes, UserError
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.params import initial_parameters, named_views
from char_gru.rnn.sampler import Generator
from char_gru.rnn.scoring import LARGEST_EFFECT, STEPS, Characters, Scorer, json_lines, score_of
from char_gru.rnn.vocabulary import Vocabulary
from tests import host_cuda

CHARACTERS = "\n abcdefgh"
V = len(CHARACTERS) + 1


def model(update: float, layers: int = 1, H: int = 12, seed: int = 5, scale: float = 3) -> tuple[Sizes, dict]:
    """Sizes and parameters of a model whose update gates z lie around sigmoid(update): it remembers long where z is
    close to 1, and forgets at once where z is close to 0."""
    sizes = Sizes(V, 6, H, layers)
    params = named_views(scale * initial_parameters(sizes, "pytorch", seed), sizes)
    for layer in range(layers):
        params[f"W_hh.{layer}"][:2 * H] *= 0.1
        params[f"b_hh.{layer}"][H:2 * H] = update
    return sizes, params


FORGETFUL, LASTING = model(-3, layers=2), model(7)


def generator_of(sizes: Sizes, params: dict, ops=cpu) -> Generator:
    return Generator(sizes, Vocabulary(CHARACTERS), params, ops)


def random_ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, V, length).astype(np.uint8)


def log_probabilities(sizes: Sizes, params: dict, ids: np.ndarray) -> np.ndarray:
    """(N - 1, V) by the specification in float64, the text in one window."""
    params = {name: array.astype(np.float64) for name, array in params.items()}
    x, ids_tb, h0 = params["W_emb"], ids[:-1, None], np.zeros((1, sizes.H))
    for layer in range(sizes.layers):
        P = reference.input_table_forward(x, params[f"W_ih.{layer}"], params[f"b_ih.{layer}"])
        h_tb = reference.gru_forward(P, ids_tb, params[f"W_hh.{layer}"], params[f"b_hh.{layer}"], h0).h_tb
        x, ids_tb = h_tb[1:, 0], np.arange(len(ids) - 1)[:, None]
    logits = x @ params["W_out"].T + params["b_out"]
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def of_targets(sizes: Sizes, params: dict, ids: np.ndarray) -> np.ndarray:
    return np.take_along_axis(log_probabilities(sizes, params, ids), ids[1:, None].astype(int), axis=1)[:, 0]


def scored(sizes: Sizes, params: dict, texts: list[np.ndarray], ops=cpu, **options) -> list[list]:
    """The parts of each text."""
    parts = Scorer(sizes, params, ops, **options).parts(texts)
    return [list(of_text) for _, of_text in itertools.groupby(parts, key=lambda part: part.text)]


def joined(parts: list) -> np.ndarray:
    return np.concatenate([part.characters.log_probabilities for part in parts])


@pytest.fixture
def small(monkeypatch):
    """Rows, run-ins, windows and parts are small, so that short texts are cut in all of these ways."""
    for name, value in {"ROWS": 7, "RUN_IN": 16, "STEPS": 20, "POSITIONS": 60, "LOGITS": 17 * V, "PART": 1500}.items():
        monkeypatch.setattr(scoring, name, value)


# One row

@pytest.mark.parametrize("length", [2, 3, STEPS, STEPS + 1, STEPS + 2])
@pytest.mark.parametrize("sizes_params", [FORGETFUL, LASTING], ids=["forgetful", "lasting"])
def test_score_is_the_loss_of_the_text_read_from_its_start(sizes_params, length):
    ids = random_ids(length)
    score = generator_of(*sizes_params).score(Vocabulary(CHARACTERS).decode(ids))
    assert score[1:] == (length - 1, 1, 0, 0.0)
    assert score.loss == pytest.approx(-of_targets(*sizes_params, ids).mean(), rel=1e-5)


@pytest.mark.parametrize("ops", [cpu, reference_ops.op_set()], ids=["cpu", "specification"])
def test_exact_score_is_that_of_the_training_model(ops):
    sizes, params = model(2, layers=2)
    ids = random_ids(2 * STEPS + 40)
    trained = LanguageModel(sizes, 512, 1)
    for name, array in params.items():
        cpu.copy_in(trained.params[name], array)
    score = generator_of(sizes, params, ops).score(Vocabulary(CHARACTERS).decode(ids), exact=True)
    assert score.loss == pytest.approx(trained.evaluate(validation_windows(ids, 1, 512)), rel=1e-7)


def test_score_of_unknown_characters():
    generator = generator_of(*FORGETFUL)
    with pytest.raises(UserError, match="'X'"):
        generator.score("abXc")
    assert generator.score("abXc", "skip") == generator.score("abc")
    unk = generator.score("abXc", "unk")
    assert unk.characters == 3
    assert unk.loss == pytest.approx(-of_targets(*FORGETFUL, np.array([3, 4, 0, 5])).mean(), rel=1e-5)


@pytest.mark.parametrize("text", ["", "a", "aXY"])
def test_text_of_fewer_than_two_characters_has_no_score(text):
    with pytest.raises(UserError, match="too short"):
        generator_of(*FORGETFUL).score(text, "skip")


def test_only_a_string_has_a_score():
    with pytest.raises(UserError, match="text: expected a string, got None"):
        generator_of(*FORGETFUL).score(None)


# Many rows

@pytest.mark.parametrize("ops", [cpu, reference_ops.op_set()], ids=["cpu", "specification"])
def test_rows_of_a_model_that_forgets_give_the_numbers_of_one_row(small, ops):
    texts = [random_ids(length, length) for length in (900, 2, 65, 64, 4000, 30, 100)]
    for ids, parts in zip(texts, scored(*FORGETFUL, texts, ops), strict=True):
        np.testing.assert_allclose(joined(parts), of_targets(*FORGETFUL, ids), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.concatenate([part.characters.ids for part in parts]), ids[1:])
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        score = score_of(parts)
        assert score.run_in == (16 if score.rows > 1 else 0) and score.run_in_effect < LARGEST_EFFECT
        assert (len(parts), score.rows > 1) == {900: (1, True), 4000: (3, True)}.get(len(ids), (1, False))


def test_model_that_does_not_forget_reads_every_text_as_one_row(small):
    texts = [random_ids(length, length) for length in (900, 80, 1400)]
    for ids, parts in zip(texts, scored(*LASTING, texts), strict=True):
        np.testing.assert_allclose(joined(parts), of_targets(*LASTING, ids), rtol=1e-3, atol=1e-4)
        assert score_of(parts)[2:] == (1, 0, 0.0)


@pytest.mark.parametrize("update", [0, 1, 2, 3])
def test_loss_changes_by_what_is_measured_at_most_or_by_rounding(small, update):
    sizes, params = model(update)
    ids = random_ids(1400)
    [parts] = scored(sizes, params, [ids])
    score = score_of(parts)
    change = abs(score.loss + of_targets(sizes, params, ids).mean())
    assert score.run_in_effect < LARGEST_EFFECT
    assert change < max(score.run_in_effect, 1e-6), score


@given(st.lists(st.integers(2, 400), min_size=1, max_size=20))
@settings(max_examples=15)
def test_texts_of_any_lengths_together_are_as_each_alone(lengths):
    texts = [random_ids(length, number) for number, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "ROWS", 4)
        patch.setattr(scoring, "RUN_IN", 24)
        counts = []
        together = scored(*FORGETFUL, texts, progress=counts.append)
    for ids, parts in zip(texts, together, strict=True):
        [alone] = scored(*FORGETFUL, [ids], exact=True)
        np.testing.assert_allclose(joined(parts), joined(alone), rtol=1e-4, atol=1e-5)
    assert sum(counts) == sum(lengths) - len(lengths)


def test_rows_together_are_about_as_many_as_there_may_be(small):
    """A row more than fit together would be read after all the others."""
    for texts in ([1000], [900, 60, 70], [400, 400, 400]):
        parts = scored(*FORGETFUL, [random_ids(length) for length in texts])
        assert sum(score_of(of_text).rows for of_text in parts) <= 7


def test_loss_of_a_diverged_model_is_no_number(small):
    sizes, params = model(0)
    params["b_out"][:] = np.nan
    with np.errstate(invalid="ignore"):
        [parts] = scored(sizes, params, [random_ids(300)])
    assert math.isnan(score_of(parts).loss)


class Unlaunched(host_cuda.HostExecutor):
    """The arrays of every launch are checked, but no kernel runs."""

    def launch(self, source, kernel, *arguments):
        pass


@pytest.mark.parametrize("layers", [1, 2])
def test_arrays_are_such_as_the_kernels_take(small, layers):
    sizes, params = model(0, layers)
    with runtime.use(Unlaunched()), np.errstate(all="ignore"):
        ops, on_device = kernels.op_set("fp32"), {}
        for name, array in params.items():
            on_device[name] = ops.empty(array.shape)
            ops.copy_in(on_device[name], array)
        [parts] = scored(sizes, on_device, [random_ids(900)], ops, details=True)
        assert sum(len(part.characters.ids) for part in parts) == 899
        generator = generator_of(sizes, on_device, ops)
        p, state = generator.next(["a", "b"])
        assert p.shape == generator.next(["a", "b"], state)[0].shape == (2, V)


# Characters

@pytest.mark.parametrize("exact", [False, True])
def test_ranks_and_likeliest_characters(small, exact):
    ids = random_ids(500)
    [parts] = scored(*FORGETFUL, [ids], details=True, exact=exact)
    found = Characters(*(np.concatenate(arrays) for arrays in zip(*(part.characters for part in parts))))
    expected = log_probabilities(*FORGETFUL, ids)
    order = np.argsort(-expected, axis=1, kind="stable")
    np.testing.assert_array_equal(found.ranks, 1 + np.argsort(order, axis=1)[np.arange(499), ids[1:]])
    np.testing.assert_array_equal(found.likeliest, order[:, :5])
    np.testing.assert_allclose(found.likeliest_log_probabilities, np.take_along_axis(expected, order[:, :5], 1),
                               rtol=1e-4, atol=1e-5)


def test_equally_likely_characters_rank_in_the_order_of_ids():
    sizes, params = model(0)
    params["W_out"][:], params["b_out"][:] = 0, [0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    [[part]] = scored(sizes, params, [np.array([1, 1, 3, 0, 2, 10])], details=True)
    assert part.characters.ranks.tolist() == [1, 2, 3, 4, 11]
    assert part.characters.likeliest.tolist() == [[1, 3, 0, 2, 4]] * 5


def test_few_characters_are_all_listed():
    sizes = Sizes(3, 2, 3)
    params = named_views(initial_parameters(sizes, "pytorch", 1), sizes)
    [[part]] = scored(sizes, params, [np.array([1, 2, 1])], details=True)
    assert part.characters.likeliest.shape == (2, 3)
    np.testing.assert_allclose(np.exp(part.characters.likeliest_log_probabilities).sum(axis=1), 1, rtol=1e-6)


def test_lines_of_json_tell_what_was_found():
    vocabulary = Vocabulary(CHARACTERS)
    texts = [random_ids(20), np.array([0, 1, 0])]
    parts = list(Scorer(*FORGETFUL, cpu, details=True).parts(texts))
    lines = [json.loads(line) for line in "".join(json_lines(parts, vocabulary, ["a", "b"])).splitlines()]
    assert [line["file"] for line in lines] == ["a"] * 20 + ["b"] * 3
    assert [line["character"] for line in lines[20:22]] == ["\n", "[UNK]"]
    for line, log_p in zip(lines, of_targets(*FORGETFUL, texts[0])):
        assert line["log_probability"] == pytest.approx(log_p, rel=1e-4)
        assert len(line["likeliest"]) == 5 and line["likeliest"][0][1] >= line["log_probability"]
        assert line["rank"] > 5 or line["likeliest"][line["rank"] - 1] == [line["character"], line["log_probability"]]
    assert lines[19] == {"file": "a", "loss": score_of(parts[:1]).loss, "characters": 19,
                         "bits_per_char": score_of(parts[:1]).loss / math.log(2)}


def test_lines_of_json_about_bytes_have_their_values():
    vocabulary = Vocabulary("\n\"\x80\xff" + "abcdef", of_bytes=True)
    parts = list(Scorer(*FORGETFUL, cpu, details=True).parts([np.array([1, 4, 0, 2])]))
    *lines, score = [json.loads(line) for line in "".join(json_lines(parts, vocabulary, None)).splitlines()]
    assert [line["byte"] for line in lines] == [255, "[UNK]", 34]
    assert {id_ for line in lines for id_, _ in line["likeliest"]} <= {*b"\n\"\x80\xffabcdef", "[UNK]"}
    assert score == {"loss": score_of(parts).loss, "bits_per_byte": score_of(parts).loss / math.log(2), "bytes": 3}


# The next character

@pytest.mark.parametrize("ops", [cpu, reference_ops.op_set()], ids=["cpu", "specification"])
def test_next_gives_the_probabilities_after_each_row(ops):
    generator, ids, state = generator_of(*FORGETFUL, ops), random_ids(40).reshape(2, 20), None
    for t in range(20):
        kept = None if state is None else state.copy()
        p, new_state = generator.next(list(generator.vocabulary.decode(ids[:, t])), state)
        if state is not None:
            np.testing.assert_array_equal(state, kept)
        state = new_state
        assert p.shape == (2, V) and p.dtype == np.float32 and p.flags.c_contiguous
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-6)
        for row in range(2):
            expected = np.exp(log_probabilities(*FORGETFUL, np.append(ids[row, :t + 1], 0))[-1])
            np.testing.assert_allclose(p[row], expected, rtol=1e-4, atol=1e-6)
    assert generator.step(["a", "b"], state, temperature=0)[0] == [
        CHARACTERS[row[1:].argmax()] for row in generator.next(["a", "b"], state)[0]]
