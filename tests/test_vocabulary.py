"""Characters to ids and back, for any Unicode text."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from char_gru.rnn import vocabulary
from char_gru.rnn.config import UserError
from char_gru.rnn.vocabulary import RARE, Vocabulary, beginning_of

ANY_TEXT = st.text(st.characters(), max_size=60)
"""Every code point may occur: astral ones, controls and lone surrogates too."""
SOME_TEXT = st.text(st.characters(), min_size=1, max_size=60)


@given(SOME_TEXT)
def test_decode_inverts_encode(text):
    known = Vocabulary.of(text)
    ids = known.encode(text)
    assert known.decode(ids) == text
    assert ids.shape == (len(text),) and (ids > 0).all()


@given(SOME_TEXT)
def test_ids_number_the_sorted_distinct_characters_from_one(text):
    known = Vocabulary.of(text)
    distinct = sorted(set(text))
    assert known.characters == "".join(distinct)
    assert len(known) == len(distinct) + 1
    assert known.encode("".join(distinct)).tolist() == list(range(1, len(known)))


@pytest.mark.parametrize(("characters", "dtype"), [
    (1, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.uint32)])
def test_ids_have_the_smallest_dtype(characters, dtype):
    text = "".join(map(chr, range(characters)))
    ids = Vocabulary.of(text).encode(text)
    assert ids.dtype == dtype
    assert ids[-1] == characters


@given(SOME_TEXT, ANY_TEXT)
def test_characters_outside_the_vocabulary_have_id_zero(text, other):
    known = Vocabulary.of(text)
    assert (known.encode(other) == 0).tolist() == [character not in text for character in other]


def test_pieces_of_a_long_text_give_the_ids_of_the_whole(monkeypatch):
    text = "any long text 🦊, read in pieces"
    whole = Vocabulary.of(text)
    ids = whole.encode(text)
    monkeypatch.setattr(vocabulary, "_CHUNK", 3)
    assert Vocabulary.of(text) == whole
    assert Vocabulary.of(text).encode(text).tolist() == ids.tolist()


def test_unk_decodes_to_the_replacement_character():
    assert Vocabulary("ab").decode(np.array([2, 0, 1])) == "b\ufffda"


@pytest.mark.parametrize("characters", ["", "aa", "aba"])
def test_vocabulary_refuses_characters_that_are_not_distinct(characters):
    with pytest.raises(ValueError, match="at least one, and distinct"):
        Vocabulary(characters)


@given(SOME_TEXT, SOME_TEXT, SOME_TEXT)
def test_vocabulary_grows_by_rows_at_its_end(first, second, third):
    """Old ids keep their meaning, however often it grows; new ones are sorted among themselves."""
    known = Vocabulary.of(first)
    for text in (second, third):
        grown = Vocabulary.of(text, known.characters)
        new = sorted(set(text) - set(known.characters))
        assert grown.characters == known.characters + "".join(new)
        assert grown.decode(grown.encode(text)) == text
        known = grown


def test_texts_that_are_none_are_refused_with_their_name():
    with pytest.raises(ValueError, match="text: expected at least one character"):
        Vocabulary.of("")
    for wrong, said in ((b"ab", "bytes; decode them first"), (5, "5"), (None, "None"), (["a"], r"\['a'\]")):
        for name, take in (("text", Vocabulary.of), ("text", Vocabulary("ab").encode), ("characters", Vocabulary)):
            with pytest.raises(UserError, match=f"^{name}: expected a string, got {said}$"):
                take(wrong)


def test_vocabularies_are_equal_if_their_characters_are():
    assert Vocabulary.of("abc") == Vocabulary("abc") == Vocabulary.of("cab")
    assert Vocabulary("abc") != Vocabulary("abd")
    assert Vocabulary("abc") != "abc"


@given(SOME_TEXT, ANY_TEXT)
def test_prompt_of_known_characters_is_encoded_as_text(text, other):
    known = Vocabulary.of(text + other)
    for on_unknown in ("error", "skip", "unk"):
        assert known.encode_prompt(other, on_unknown).tolist() == known.encode(other).tolist()


@given(SOME_TEXT, ANY_TEXT)
def test_unknown_characters_of_a_prompt_are_skipped_or_become_unk(text, prompt):
    known = Vocabulary.of(text)
    kept = "".join(character for character in prompt if character in text)
    assert known.decode(known.encode_prompt(prompt, "skip")) == kept
    assert known.encode_prompt(prompt, "unk").tolist() == known.encode(prompt).tolist()


@given(SOME_TEXT, st.text(st.characters(), min_size=1, max_size=10))
def test_error_shows_every_unknown_character_in_one_line(text, prompt):
    known, unknown = Vocabulary.of(text), sorted(set(prompt) - set(text))
    if not unknown:
        return
    with pytest.raises(UserError) as caught:
        known.encode_prompt(prompt)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert all((character if character.isprintable() else ascii(character)[1:-1]) in message for character in unknown)


@pytest.mark.parametrize(("prompt", "shown"), [
    ("aé🦊", "'é' '🦊'"), ("a\u2028", r"'\u2028'"), ("a\ud800", r"'\ud800'"), ("xyzx", "'x' 'y' 'z'"),
    ("".join(map(chr, range(256, 3276))), f"{' '.join(repr(chr(256 + n)) for n in range(20))} and 3,000 more")])
def test_error_shows_unknown_characters_once_and_readably(prompt, shown):
    with pytest.raises(UserError) as caught:
        Vocabulary("a").encode_prompt(prompt)
    assert f": {shown};" in str(caught.value)
    assert "--on-unknown" in str(caught.value)


@pytest.mark.parametrize("ids", [[3], [-1], [0, 1.5], [300]])
def test_ids_of_no_character_are_refused(ids):
    with pytest.raises(ValueError, match="^ids: expected "):
        Vocabulary("ab").decode(np.array(ids))
    assert Vocabulary("ab").decode(np.array([])) == ""


# How a text begins

@pytest.mark.parametrize(("text", "beginning"), [
    ("anna\nbo; cleo\n", "\n"),
    ("anna;bo;cleo", ";"),
    ("anna;bo;cleo\n", ";"),  # nothing follows the newline
    ("Anna Maria;Jean Luc;Bo", ";"),
    ("anna\rbo\rcleo", "\r"),
    ("anna\u2028bo;cleo", "\u2028"),
    ("1\t2\t3", "\t"),
    ("anna|bo|cleo", "|"),
    ("anna,bo,cleo,1, 2", ","),
    ("The fox; the dog, too. A cat.", " "),  # semicolon and comma stand before spaces
    ("anna/bo/cleo", "/"),
    ("今日は、雨。明日も、晴", "、"),
    ("ACGTTGTA", "T"),
    ("a", "a"), ("\n", "\n"), ("aab", "a"),
    ("anna;" * RARE + "x\ny", ";"),  # one newline in 50,000 characters teaches nothing
    ("anna;" * RARE + "x\ny" * 6, ";"),  # nor do six, beside so many semicolons in a line
    ("anna;bo\n" * RARE, "\n"), ("name,age,town,street\n" + "bo,5,Ulm,Ring\n" * 9, "\n"),
    ("names\n" + "anna;bo;cleo;" * 9, ";"), ("names\n\n" + "anna,bo,cleo," * 9, ","),
    ("names\n" + "anna ; bo ; " * 9, " "), ("two names\n" + "Anna; Bo, the dog, " * 9, "\n"),
    ("anna##bo##cleo", "#"), ("anna ; bo ; cleo", " "), ("anna\n\nbo\n\ncleo", "\n"), ("anna=>bo=>cleo", ">"),
    ("anna;|bo;|cleo;|", "|"),
])
def test_beginning_is_a_character_that_the_text_has_before_one(text, beginning):
    assert beginning_of(text) == Vocabulary.of(text).beginning == beginning


@given(SOME_TEXT)
def test_beginning_is_a_character_of_the_text(text):
    assert beginning_of(text) in text


@pytest.mark.parametrize(("characters", "beginning"), [
    ("ab;,", ";"), ("a, b", ","), ("a b", " "), ("a/1", "/"), ("ab", "a"), ("\r\n", "\n")])
def test_beginning_that_is_unknown_is_replaced_by_a_character_that_has_a_row(characters, beginning):
    assert Vocabulary(characters).beginning == beginning
    assert Vocabulary(characters, "z").beginning == beginning


def test_vocabulary_without_a_text_begins_lines():
    assert Vocabulary("a\nb").beginning == "\n"
    for beginning in ("", ";;", 3, ["a"]):
        with pytest.raises(ValueError, match="beginning must be one character"):
            Vocabulary("ab", beginning)


# Bytes

ALL_BYTES = Vocabulary("".join(map(chr, range(256))), of_bytes=True)


def test_bytes_are_numbered_in_the_order_of_their_values_from_one():
    known = Vocabulary.of(b"\xff\0b\xffa\n".decode("latin-1"), of_bytes=True)
    assert known.as_bytes(known.characters) == b"\0\nab\xff"
    assert known.encode(known.as_characters(b"\xff\0c")).tolist() == [5, 1, 0]
    assert (known.of_bytes, known.unit, Vocabulary("a").unit) == (True, "byte", "character")
    assert Vocabulary("ab", of_bytes=True) != Vocabulary("ab")
    grown = Vocabulary.of("\x80b", known.characters, of_bytes=True)
    assert grown.of_bytes and grown.characters == known.characters + "\x80"


@given(st.text(max_size=60), st.binary(max_size=60))
def test_text_becomes_the_bytes_of_its_utf_8_and_bytes_stay_as_they_are(text, raw):
    assert ALL_BYTES.as_bytes(ALL_BYTES.as_learnt(text)) == text.encode()
    assert ALL_BYTES.as_text(ALL_BYTES.as_learnt(text)) == text
    for given_as in (raw, os.fsdecode(raw)):  # the second as on a command line
        assert ALL_BYTES.as_bytes(ALL_BYTES.as_learnt(given_as)) == raw


@given(st.lists(st.binary(max_size=3) | st.text(max_size=2).map(str.encode), max_size=12), st.integers(1, 3))
def test_bytes_that_come_in_pieces_become_the_text_of_the_whole(parts, size):
    raw = b"".join(parts)
    decode = ALL_BYTES.text_decoder()
    pieces = [decode(ALL_BYTES.as_characters(raw[start:start + size]), False) for start in range(0, len(raw), size)]
    assert "".join([*pieces, decode("", True)]) == raw.decode("utf-8", "replace")


def test_character_comes_with_its_last_byte():
    decode = ALL_BYTES.text_decoder()
    assert [decode(chr(byte), False) for byte in "é🦊".encode()] == ["", "é", "", "", "", "🦊"]
    assert (decode("\xc3", False), decode("a", False), decode("\xff\xc3", False), decode("", True)) == (
        "", "\ufffda", "\ufffd", "\ufffd")


def test_unknown_bytes_are_shown_as_bytes():
    with pytest.raises(UserError, match=r"bytes that the model has not learnt: b'\\x9f' b'\\xc3'; "):
        known = Vocabulary("abc", of_bytes=True)
        known.encode_prompt(known.as_learnt("aß"))


def test_what_stands_for_no_byte_is_refused():
    with pytest.raises(ValueError, match="must be U\\+0000 to U\\+00FF"):
        Vocabulary("a\u0100", of_bytes=True)
    with pytest.raises(UserError, match=r"prompts: has no UTF-8 \('\\ud800'\)"):
        ALL_BYTES.as_learnt("a\ud800", "prompts")
    with pytest.raises(UserError, match="text: expected a string, got 3"):
        ALL_BYTES.as_learnt(3)
    with pytest.raises(UserError, match="text: expected a string, got bytes; decode them first"):
        Vocabulary("ab").as_learnt(b"ab")


@pytest.mark.parametrize(("text", "beginning"), [
    ("холод хор храм " * 9, " "),  # U+0085, a line's end, is among the bytes of х in UTF-8
    ("один\nдва, три\n" * 9, "\n"), ("anna;bo;cleo" * 9, ";")])
def test_beginning_of_bytes_is_that_of_their_ascii(text, beginning):
    assert Vocabulary.of(ALL_BYTES.as_characters(text), of_bytes=True).beginning == beginning
    assert b"\x85" in "холод".encode()


@given(st.binary(min_size=1, max_size=60))
def test_beginning_of_bytes_is_one_of_them(raw):
    assert Vocabulary.of(raw.decode("latin-1"), of_bytes=True).beginning.encode("latin-1") in raw
