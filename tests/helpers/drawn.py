"""The comparison of drawn characters: what the uniform numbers allow, up to rounding.

A character is drawn where the cumulative shares of the characters, in the order of ids, pass the row's uniform number
(`rnn.reference.sample`). Where that number lies within rounding of a border of two shares, an implementation may draw
the character on the other side, and reads other characters than the specification from then on. So the specification
reads the text that was written (`read_by_reference` of texts.py), and each character is compared by itself, given all
characters before it: all characters of a text are compared, also those behind such a difference.

What rounding allows:

    logit_error  of a computed logit: what `assert_close` allows it; 0 where the logits are given
    distance     of a uniform number from the share of the character drawn: logit_error / (2 temperature), because a
                 border c moves by at most c (1 - c) 2 logit_error / temperature; and, for the drawing, FACTOR times
                 the largest error of the specification's shares in float32, and FLOOR epsilons
    filters      top_k, top_p and min_p each keep the first characters of a ranking. Their number is uncertain where a
                 cumulative share lies within `distance` of top_p, or where a character is min_p times as likely as the
                 most likely one, up to 2 logit_error / temperature and FLOOR epsilons. The last one kept and the first
                 one left out may change places where their logits are within 2 logit_error of each other, and so may
                 the two most likely characters at temperature 0

Such differences are rare, and a comparison allows one more than it predicts: for each character, the chance that a
uniform number lies within `distance` of a border, or 1 where a filter is uncertain.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from char_gru.rnn import reference
from tests.helpers.compare import FACTOR, FLOOR, assert_within

EPS = float(np.finfo(np.float32).eps)

LARGEST_DISTANCE = 1e-4
"""A comparison that allows more than this is refused: it would see little."""


class Drawn(NamedTuple):
    """The result of a comparison: how many characters were compared; how many of them are not the specification's; how
    many of these rounding predicts; the distance that was allowed."""

    characters: int
    differences: int
    predicted: float
    distance: float


def assert_drawn(name: str, ids, uniforms, exact, single=None, *, temperature=1.0, top_k=0, top_p=1.0,
                 min_p=0.0) -> Drawn:
    """Assert that characters are drawn as the specification draws them, up to rounding.

    exact: logits in float64; single: the same logits by the specification in float32. Without `single`, the logits were
    given, as exactly these numbers.

    Shapes: ids, uniforms (N,); exact, single (N, V).
    Raises: AssertionError that names the first character that no rounding explains, or the number of differences.
    """
    ids, known = np.asarray(ids), np.asarray(exact, np.float64)[:, 1:]
    assert ids.shape == uniforms.shape == (len(known),), f"{name}: {ids.shape} characters of {len(known)} logits"
    assert np.isfinite(known).all(), f"{name}: the exact logits are not finite"
    bad = np.flatnonzero((ids < 1) | (ids > known.shape[1]))
    assert len(bad) == 0, f"{name}[{bad[0]}] is {ids[bad[0]]}, which is never drawn"
    if len(ids) == 0:
        return Drawn(0, 0, 0.0, 0.0)
    logit_error = 0.0
    if single is not None:
        logit_error = FLOOR * EPS * np.abs(known).max() + FACTOR * np.abs(single[:, 1:] - known).max()
    # Temperature 0 takes the first of the ranking, as top_k = 1 does at any temperature.
    rows = _Rows(known, logit_error, *((1.0, 1, 1.0, 0.0) if temperature == 0 else (temperature, top_k, top_p, min_p)))
    assert rows.distance <= LARGEST_DISTANCE, f"{name}: rounding moves shares by {rows.distance:.3g}"
    expected = reference.sample(np.asarray(exact, np.float64), uniforms, temperature, top_k, top_p, min_p)
    differing = np.flatnonzero(ids != expected)
    for n in differing:
        distance = rows.distance_of(n, ids[n] - 1, float(uniforms[n]))
        assert_within(name, distance, rows.distance, f"{name}[{n}] is {ids[n]}, not {expected[n]}, and the "
                      f"uniform number {uniforms[n]} away from the share of {ids[n]}")
    predicted = float(rows.chances().sum())
    assert len(differing) <= 1 + predicted, (
        f"{name}: {len(differing)} of {len(ids)} characters lie across a border, rounding predicts {predicted:.3g}; "
        f"the first is {name}[{differing[0]}]")
    return Drawn(len(ids), len(differing), predicted, rows.distance)


class _Rows:
    """N rows of K logits. Characters are counted without [UNK]: v is the character of id v + 1.

    order (N, K): the characters, the most likely one first; p (N, K): how likely each is, relative to the most likely
    one; fewest, most (N,): how many characters of the ranking are kept; near (N, K + 1): whether rounding may exchange
    the last of so many characters of the ranking with the next one.
    """

    def __init__(self, known, logit_error, temperature, top_k, top_p, min_p):
        N, K = known.shape
        self.order = np.argsort(-known, axis=1, kind="stable")
        self.p = np.exp((known - known.max(axis=1, keepdims=True)) / temperature)
        ranked, filters = np.take_along_axis(self.p, self.order, axis=1), (top_k, top_p, min_p)
        kept, _ = _kept(ranked, *filters, 0.0, 0.0)
        mask, rounded = np.argsort(self.order, axis=1) < kept[:, None], known.astype(np.float32)
        drawing_error = np.abs(_shares(rounded, mask, temperature)
                               - _shares(rounded.astype(np.float64), mask, temperature)).max()
        self.distance = float(logit_error / (2 * temperature) + FACTOR * drawing_error + FLOOR * EPS)
        self.fewest, self.most = _kept(ranked, *filters, self.distance, 2 * logit_error / temperature + FLOOR * EPS)
        self.near = np.zeros((N, K + 1), bool)
        gaps = -np.diff(np.take_along_axis(known, self.order, axis=1), axis=1)
        self.near[:, 1:K] = (gaps <= 2 * logit_error) & (logit_error > 0)  # logits that are given keep their ranking

    def chances(self) -> np.ndarray:
        """Of each row, the chance of a difference, for a uniform number that may be any."""
        uncertain = (self.fewest < self.most) | self.near[np.arange(len(self.near)), self.fewest]
        return np.where(uncertain, 1.0, np.minimum(1, 2 * self.distance * (self.fewest - 1)))

    def distance_of(self, n: int, v: int, uniform: float) -> float:
        """How far the uniform number is from the share of character v in row n, by the outcome of the filters that
        brings it nearest; infinite where no outcome keeps the character."""
        distances = [np.inf]
        for count in range(self.fewest[n], self.most[n] + 1):
            kept = list(self.order[n, :count])
            for members in [kept, [*kept[:-1], self.order[n, count]]] if self.near[n, count] else [kept]:
                if v in members and np.float32(self.p[n, v]) > 0:
                    p = np.where(np.isin(np.arange(self.p.shape[1]), members), self.p[n], 0)
                    end = p[:v + 1].sum() / p.sum()
                    distances.append(max(end - p[v] / p.sum() - uniform, uniform - end, 0.0))
        return min(distances)


def _kept(ranked, top_k, top_p, min_p, share_error, ratio_error) -> tuple[np.ndarray, np.ndarray]:
    """The fewest and the most characters that the filters keep. ranked (N, K): how likely each character is, relative
    to the most likely one, which is the first."""
    of_top_k = np.where(np.arange(ranked.shape[1]) < (top_k or np.inf), ranked, 0)
    reached = np.cumsum(of_top_k, axis=1)
    before = (reached - of_top_k) / reached[:, -1:]
    results = []
    for sign in (-1, 1):
        counts = [np.full(len(ranked), min(top_k or ranked.shape[1], ranked.shape[1])),
                  (ranked >= min_p * (1 - sign * ratio_error)).sum(axis=1)]
        if top_p < 1:
            counts.append((before < top_p + sign * share_error).sum(axis=1))
        results.append(np.maximum(np.min(counts, axis=0), 1))
    return results[0], results[1]


def _shares(known, kept, temperature) -> np.ndarray:
    """Cumulative shares of the kept characters, computed in the dtype of the logits."""
    p = np.where(kept, np.exp((known - known.max(axis=1, keepdims=True)) / known.dtype.type(temperature)), 0)
    reached = np.cumsum(p, axis=1, dtype=known.dtype)
    return reached / reached[:, -1:]
