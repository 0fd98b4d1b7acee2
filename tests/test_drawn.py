"""The comparison of drawn characters lets rounding pass, and catches the faults of kernels that draw."""

import numpy as np
import pytest

from char_gru.kernels import runtime
from char_gru.kernels.generate import sample
from char_gru.rnn import reference
from char_gru.rnn.params import named_views
from char_gru.rnn.sampler import Generator
from char_gru.rnn.vocabulary import Vocabulary
from tests.helpers import texts
from tests.helpers.drawn import assert_drawn
from tests.helpers.texts import (
    OPTIONS,
    assert_text_matches_reference,
    assert_texts_drawn,
    read_by_reference,
    text_case,
)

N, V = 400, 13


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (N, V) in float64 and as float32 computes them, and uniform numbers (N,)."""
    rng = np.random.default_rng(seed)
    exact = 2 * rng.standard_normal((N, V))
    return exact, exact.astype(np.float32), rng.random(N, np.float32)


# Faults of the arrays

FAULTS = {
    "the next character": lambda ids, exact, uniforms: ids % (V - 1) + 1,
    "one row shifted": lambda ids, exact, uniforms: np.where(np.arange(N) == 7, ids % (V - 1) + 1, ids),
    "the row beside it": lambda ids, exact, uniforms: np.roll(ids, 1),
    "the number of the row beside it": lambda ids, exact, uniforms: reference.sample(exact, np.roll(uniforms, 1)),
    "one number for all rows": lambda ids, exact, uniforms: reference.sample(exact, np.full(N, 0.5)),
    "the logits of the row before": lambda ids, exact, uniforms: reference.sample(np.roll(exact, 1, 0), uniforms),
    "borders off by 1e-4": lambda ids, exact, uniforms: reference.sample(exact, np.minimum(uniforms + 1e-4, 1 - 1e-7)),
    "[UNK]": lambda ids, exact, uniforms: np.where(np.arange(N) == 7, 0, ids),
    "no character": lambda ids, exact, uniforms: np.where(np.arange(N) == 7, V, ids),
    "a row too few": lambda ids, exact, uniforms: ids[1:],
}


def test_comparison_accepts_what_float32_draws():
    exact, single, uniforms = rows()
    drawn = assert_drawn("ids", reference.sample(single, uniforms), uniforms, exact, single)
    assert drawn.characters == N and drawn.differences == 0
    assert drawn.distance < 1e-5 and drawn.predicted < 0.1


@pytest.mark.parametrize("fault", FAULTS)
def test_comparison_catches(fault):
    exact, single, uniforms = rows()
    if fault == "borders off by 1e-4":  # so small a shift shows where a number lies in between
        uniforms[7] = border(exact)[7] - 5e-5
    ids = FAULTS[fault](reference.sample(exact, uniforms), exact, uniforms)
    with pytest.raises(AssertionError, match="ids"):
        assert_drawn("ids", ids, uniforms, exact, single)


@pytest.mark.parametrize("forgotten", OPTIONS)
def test_comparison_catches_an_option_that_is_forgotten(forgotten):
    exact, single, uniforms = rows()
    some = {name: value for name, value in OPTIONS.items() if name != forgotten}
    ids = reference.sample(exact, uniforms, **some)
    with pytest.raises(AssertionError, match="away from the share"):
        assert_drawn("ids", ids, uniforms, exact, single, **OPTIONS)


# Borders

def border(exact: np.ndarray) -> np.ndarray:
    """Of each row, the border of two shares that is nearest to 0.5."""
    p = np.exp(exact[:, 1:])
    borders = np.cumsum(p, axis=1)[:, :-1] / p.sum(axis=1, keepdims=True)
    return np.take_along_axis(borders, np.abs(borders - 0.5).argmin(axis=1)[:, None], axis=1)[:, 0]


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("beyond", [False, True])
def test_a_number_at_a_border_may_draw_the_character_on_the_other_side(side, beyond):
    exact, single, uniforms = rows()
    allowed = assert_drawn("ids", reference.sample(exact, uniforms), uniforms, exact, single).distance
    ids = reference.sample(exact, uniforms)
    uniforms[7] = border(exact)[7] + side * allowed * (1.5 if beyond else 0.5)
    ids[7] = reference.sample(exact[7:8], border(exact)[7:8] - side * 1e-3)[0]
    if beyond:
        with pytest.raises(AssertionError, match=r"ids\[7\] is .* away from the share"):
            assert_drawn("ids", ids, uniforms, exact, single)
    else:
        assert assert_drawn("ids", ids, uniforms, exact, single).differences == 1


def test_more_differences_than_rounding_predicts_are_refused():
    exact, single, uniforms = rows()
    uniforms[:3] = border(exact)[:3].astype(np.float32)
    before, behind = (reference.sample(exact, uniforms + sign * np.float32(1e-6) * (np.arange(N) < 3))
                      for sign in (-1, 1))
    assert (before != behind).sum() == 3
    refused = 0
    for ids in (before, behind):  # two of three numbers were rounded to one side
        try:
            assert_drawn("ids", ids, uniforms, exact, single)
        except AssertionError as error:
            refused += "characters lie across a border, rounding predicts" in str(error)
    assert refused == 1


def at_an_edge(near: float) -> dict:
    """Logits without [UNK], options, a uniform number, and the characters that it draws with the character at the
    filter's edge in and out; near: how far that character is from the edge."""
    close, shares = [1.0, 2.0, 1.0 - near, 3.0], np.log([0.5, 0.25, 0.15, 0.1])
    return {
        "the last of top_k and the next": (close, {"top_k": 3}, 0.0, (1, 2)),
        "the last of top_p and the next": (close, {"top_p": 0.9}, 0.0, (1, 2)),
        "the end of top_p": (shares, {"top_p": 0.75 + near}, 0.9, (3, 2)),
        "the end of min_p": (shares, {"min_p": 0.3 - near}, 0.99, (3, 2)),
        "temperature 0": ([1.0, 3.0, 3.0 - near], {"temperature": 0.0}, 0.5, (2, 3)),
    }


@pytest.mark.parametrize("near, both", [(1e-7, True), (1e-3, False)])
@pytest.mark.parametrize("name", at_an_edge(0))
def test_a_character_at_the_edge_of_a_filter_may_be_in_or_out(name, near, both):
    logits, options, uniform, (inside, outside) = at_an_edge(near)[name]
    exact, uniforms = np.array([[9.0, *logits]]), np.array([uniform], np.float32)
    assert reference.sample(exact, uniforms, **options)[0] == inside
    for id in range(1, 1 + len(logits)):
        if id == inside or (both and id == outside):
            assert assert_drawn("ids", np.array([id]), uniforms, exact, exact, **options).differences == (id != inside)
        else:
            with pytest.raises(AssertionError, match="away from the share"):
                assert_drawn("ids", np.array([id]), uniforms, exact, exact, **options)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"temperature": 0.0}], ids=str)
def test_logits_that_are_given_keep_their_ranking(options):
    exact = np.array([[9.0, 1.0, 2.0, 1.0 - 1e-7, 3.0], [9.0, 3.0 - 1e-7, 0.0, 0.0, 3.0]])
    uniforms = np.zeros(2, np.float32)
    ids = reference.sample(exact, uniforms, **options)
    assert_drawn("ids", ids, uniforms, exact, **options)
    with pytest.raises(AssertionError, match="away from the share"):
        assert_drawn("ids", np.where(ids == 1, 2, 1), uniforms, exact, **options)


def test_logits_too_far_from_the_exact_ones_are_refused():
    exact, single, uniforms = rows()
    with pytest.raises(AssertionError, match="rounding moves shares by"):
        assert_drawn("ids", reference.sample(exact, uniforms), uniforms, exact, single + np.float32(0.01))


# Faults of whole texts

@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_specification_reads_a_text_as_it_writes_it(layers, weights):
    case, (first, forced_tr, uniforms_tr) = text_case(3, H=5, V=7, layers=layers), texts.prompts(6, 3, 7)
    params = named_views(case.flat_params, case.sizes)
    P = reference.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"])
    h, _, ids_tr = reference.generate(params, P, case.h0, first, forced_tr, uniforms_tr, weights=weights)
    logits_tr, h_read = read_by_reference(params, case.h0, first, ids_tr, np.float64, weights=weights)
    np.testing.assert_array_equal(h_read, h)
    drawn = [reference.sample(logits, uniforms) for logits, uniforms in zip(logits_tr, uniforms_tr)]
    np.testing.assert_array_equal(np.where(forced_tr >= 0, forced_tr, drawn), ids_tr)


TEXT_FAULTS = {  # what becomes of the arguments of assert_texts_drawn
    "another seed": lambda prompts, texts, seed: (prompts, texts, seed + 1),
    "rows exchanged": lambda prompts, texts, seed: (prompts, texts[::-1], seed),
    "a prompt that was not read to its end": lambda prompts, texts, seed: (["", *4 * ["ab"]], texts, seed),
    "a character lost": lambda prompts, texts, seed: (prompts, [text[1:] for text in texts], seed),
    "a character changed": lambda prompts, texts, seed: (prompts, [*texts[:-1], f"{texts[-1][:-1]}?"], seed),
    "an option forgotten": lambda prompts, texts, seed: (prompts, texts, seed, {}),
}


@pytest.mark.parametrize("fault", [None, *TEXT_FAULTS])
def test_comparison_catches_a_text_with(fault):
    vocabulary, case = Vocabulary("\n ?abcd"), text_case(1, H=8, V=8, layers=2, scale=2)
    params = named_views(case.flat_params.astype(np.float32), case.sizes)
    prompts, seed, options = ["", *4 * ["abc"]], 3, {"temperature": 0.8}
    texts = Generator(case.sizes, vocabulary, params).generate(prompts, 30, seed=seed, **options)
    if fault is None:
        assert assert_texts_drawn(params, vocabulary, prompts, texts, seed, **options).characters == 150
        return
    prompts, texts, seed, *others = TEXT_FAULTS[fault](prompts, texts, seed)
    with pytest.raises(AssertionError, match="^texts.* away from the share"):
        assert_texts_drawn(params, vocabulary, prompts, texts, seed, **(others[0] if others else options))


# Faults of the kernels

KERNEL_FAULTS = {  # variant, V, a text of the kernel's source, and the text that it becomes
    "the next character": ("stepwise", 13, "p > 0.0f && reached > uniform", "p > 0.0f && reached - p > uniform"),
    "top_k forgotten": ("stepwise", 13, "options.top_k == 0 || rank < options.top_k", "true"),
    "top_p forgotten": ("stepwise", 13, "options.top_p >= 1.0f || p_before", "true || p_before"),
    "top_k of many characters forgotten": ("stepwise", 300, "if (options.top_k > 0)", "if (false)"),
    "top_p of many characters forgotten": (
        "stepwise", 300, "if (options.top_p < 1.0f) {\n        const", "if (false) {\n        const"),
    "min_p forgotten": ("stepwise", 13, ">= threshold && p >= options.min_p", ">= threshold"),
    "temperature ignored": ("stepwise", 13, "(logits[v] - largest) / temperature", "logits[v] - largest"),
    "the logits of another row": (
        "persistent", 13, "of_group + row * logits_stride", "of_group + (row + 1) % rows * logits_stride"),
    "the number of the row beside it": (
        "stepwise", 13, "uniforms_tr[offset]", "uniforms_tr[offset + ((row + 1) % R - row)]"),
    "the number of the row beside it, persistent": (
        "persistent", 13, "uniforms_tr[before + row]", "uniforms_tr[before + (row + 1) % rows]"),
    "the number of the row beside it, batched": (
        "batched", 13, "uniforms_tr[offset]", "uniforms_tr[offset + ((row + 1) % rows - row)]"),
    "the number of the step before": ("stepwise", 13, "uniforms_tr[offset]", "uniforms_tr[max(*t - 1, 0) * R + row]"),
    "the number of the step before, persistent": (
        "persistent", 13, "uniforms_tr[before + row]", "uniforms_tr[max(t - 2, 0) * R + first_row + row]"),
    "the number of the step before, batched": (
        "batched", 13, "uniforms_tr[offset]", "uniforms_tr[max(t - 1, 0) * R + first_row + row]"),
    "the character of another row is read": ("persistent", 13, "own_ids[row] * 3", "own_ids[0] * 3"),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * any(word in name for word in ("many", "persistent", "batched")))
    for name in KERNEL_FAULTS])
def test_comparison_catches_a_kernel_with(plant, name):
    variant, V, old, new = KERNEL_FAULTS[name]
    case = text_case(9, H=6, V=V, layers=1)
    assert assert_text_matches_reference(case, 8, **OPTIONS, variant=variant).differences <= 1
    plant(old, new)
    with pytest.raises(AssertionError, match="^drawn.* away from the share"):
        assert_text_matches_reference(case, 8, **OPTIONS, variant=variant)


@pytest.fixture
def written_at_borders(monkeypatch):
    """Writes a character in each of 64 rows, each with a number at a border of shares or so far from it, and compares
    them."""
    def compared(variant: str, away: float = 0.0) -> None:
        case = text_case(64, H=6, V=13, layers=1)
        first, forced_tr = np.arange(64, dtype=np.int32) % 12 + 1, np.full((1, 64), -1, np.int32)
        [logits], _ = read_by_reference(named_views(case.flat_params, case.sizes), case.h0, first, forced_tr,
                                        np.float64)
        uniforms_tr = (border(logits) + away * np.resize([-1, 1], 64)).astype(np.float32)[None]
        monkeypatch.setattr(texts, "prompts", lambda T, R, V: (first, forced_tr, uniforms_tr))
        assert_text_matches_reference(case, 1, variant=variant)

    return compared


@pytest.mark.parametrize("variant", [
    "stepwise", "persistent", pytest.param("batched", marks=pytest.mark.capability(80))])
def test_where_every_number_is_at_a_border_rounding_explains_each_difference(executor, written_at_borders, variant):
    """But not that there are so many."""
    with pytest.raises(AssertionError, match="^drawn.* characters lie across a border"):
        written_at_borders(variant)


@pytest.mark.parametrize("error, away, said", [(2**-20, 1e-7, "across a border"), (2**-12, 1e-5, "from the share")])
def test_an_expf_that_errs_by_eight_epsilons_passes_and_by_two_thousand_does_not(plant, written_at_borders, error,
                                                                                 away, said):
    expf = "expf((logits[v] - largest) / temperature)"
    plant(f"return {expf};", f"return {expf} * (1.0f + (v % 2 ? {error}f : {-error}f));")
    with pytest.raises(AssertionError, match=f"^drawn.* {said}"):
        written_at_borders("stepwise", away)


def test_only_numbers_at_a_border_show_which_side_it_belongs_to(plant):
    """`test_borders_are_exact_where_the_numbers_are` of test_sample.py catches this fault, no comparison of texts."""
    plant("reached > uniform * total", "reached >= uniform * total")
    assert_text_matches_reference(text_case(9, H=6, V=13, layers=1), 8, **OPTIONS, variant="stepwise")
    ids = runtime.empty((3,), np.int32)
    sample(*map(runtime.to_device, (np.zeros((3, 5), np.float32), np.float32([0.25, 0.5, 0.75]))), ids)
    assert runtime.to_host(ids).tolist() == [1, 2, 3]  # not 2, 3, 4
