"""The HTML page of `rnn.export`, in a browser: it writes and reads as the Python package does, and shows its inside.

Every page that a test opens must log nothing to the console, and load nothing but itself.
"""

import base64
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from char_gru.rnn import commands, reference
from char_gru.rnn.activations import properties
from char_gru.rnn.checkpoint import Checkpoint, save_checkpoint
from char_gru.rnn.config import Sizes, UserError
from char_gru.rnn.export.page import page_bytes
from char_gru.rnn.params import initial_parameters, named_views, parameter_shapes
from char_gru.rnn.sampler import Generator
from char_gru.rnn.vocabulary import Vocabulary

CHARACTERS = "\n \"()ABabcde"
TEXT = 'A bad "ABBA"\n(a bee)\n\ndead "cab (dad\n\nAB' * 2
Open = Callable[..., Page]

TUTORIAL = Sizes(V=66, E=256, H=1024)

PROPERTIES = ["line position", "case", "quotes", "brackets", "spaces"]
PLACES = [  # characters of a text, and what holds after each of them, in the order of PROPERTIES
    ("a", 1, 0, 0, 0, 0), ("B", 2, 1, 0, 0, 0), (" ", 3, 1, 0, 0, 1), ('"', 4, 1, 1, 0, 0), ("(", 5, 1, 1, 1, 0),
    ("[", 6, 1, 1, 1, 0), (")", 7, 1, 1, 1, 0), ("ß", 8, 0, 1, 1, 0), ("]", 9, 0, 1, 0, 0), ("}", 10, 0, 1, 0, 0),
    ("{", 11, 0, 1, 1, 0), ("🦊", 12, 0, 1, 1, 0), ("\n", 0, 0, 1, 1, 1), ("\n", 0, 0, 0, 0, 1), ("É", 1, 1, 0, 0, 0),
    ("“", 2, 1, 1, 0, 0), ("x", 3, 0, 1, 0, 0), ("\t", 4, 0, 1, 0, 1), ("”", 5, 0, 0, 0, 0), ("\n", 0, 0, 0, 0, 1),
    ("“", 1, 0, 1, 0, 0), ('"', 2, 0, 0, 0, 0), ("”", 3, 0, 0, 0, 0), ("\r", 4, 0, 0, 0, 1),
]


def model(layers: int = 2, characters: str = CHARACTERS, H: int = 26) -> Checkpoint:
    """A model whose distributions are far from flat."""
    sizes = Sizes(len(characters) + 1, 6, H, layers)
    flat = 3 * initial_parameters(sizes, "pytorch", 5)
    return Checkpoint(sizes, Vocabulary(characters), dict(named_views(flat, sizes)))


def generator_of(checkpoint: Checkpoint) -> Generator:
    return Generator(checkpoint.sizes, checkpoint.vocabulary, checkpoint.params)


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """One tab for all tests, since a new one takes longer than most of them."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("the page is tested in Chromium, which is not installed")
    with sync_playwright() as playwright, playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"]) as browser:
        yield browser.new_page()


@pytest.fixture
def logged(tab) -> Iterator[list[str]]:
    """What pages of a test logged, threw, or asked for, beside their own file; the test fails if it leaves any."""
    found: list[str] = []
    listeners = {"console": lambda message: found.append(message.text),
                 "pageerror": lambda error: found.append(str(error)),
                 "request": lambda request: re.search("^file:.*/page.html$", request.url) or found.append(request.url)}
    for event, listener in listeners.items():
        tab.on(event, listener)
    yield found
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert found == []


@pytest.fixture
def open_page(tab, logged, tmp_path) -> Open:
    """Opens the page of a model."""
    def opened(checkpoint: Checkpoint, weights: str = "fp32") -> Page:
        file = tmp_path / "page.html"
        file.write_bytes(page_bytes(checkpoint, weights))
        tab.set_viewport_size({"width": 1280, "height": 720})
        tab.emulate_media(color_scheme="light", reduced_motion="no-preference")
        tab.mouse.move(0, 0)
        tab.goto(file.as_uri())
        return tab

    return opened


def write(page: Page, prompt: str, **fields: object) -> str:
    """Fill the fields by their labels, write, and give the text on the page."""
    page.get_by_label("Prompt").fill(prompt)
    for label, value in fields.items():
        page.get_by_label(label.replace("_", "-"), exact=True).fill(str(value))
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#status")).to_have_text(re.compile("^Wrote"))
    return page.locator("#text").text_content()


def read(page: Page, text: str) -> None:
    page.get_by_label("A text to read").fill(text)
    page.get_by_role("button", name="Read").click()
    expect(page.locator("#status")).to_have_text(re.compile("^Read "))


def js(value: object) -> str:
    """A value as an expression of JavaScript."""
    return json.dumps(value)


def states(checkpoint: Checkpoint, text: str) -> dict[tuple[str, int], np.ndarray]:
    """(array, layer) -> (N, H) of h, r, z and n after each character, by the specification in float64."""
    params = {name: array.astype(np.float64) for name, array in checkpoint.params.items()}
    x, rows_tb = params["W_emb"], checkpoint.vocabulary.encode(text).astype(np.int32)[:, None]
    found = {}
    for layer in range(checkpoint.sizes.layers):
        P = reference.input_table_forward(x, params[f"W_ih.{layer}"], params[f"b_ih.{layer}"])
        saved = reference.gru_forward(P, rows_tb, params[f"W_hh.{layer}"], params[f"b_hh.{layer}"],
                                      np.zeros((1, checkpoint.sizes.H)))
        x, rows_tb = saved.h_tb[1:, 0], np.arange(len(text))[:, None]
        found["h", layer] = x
        found |= {(name, layer): gate for name, gate in zip("rzn", np.split(saved.gates_tb[:, 0], 3, axis=1))}
    return found


def values_of(array: dict | list) -> list[float]:
    """The numbers of a typed array of JavaScript, which some versions of Playwright give as a dictionary."""
    return list(array.values()) if isinstance(array, dict) else array


# Writing

@pytest.mark.parametrize("layers", [1, 2])
def test_page_writes_the_text_of_generate(open_page, layers):
    checkpoint = model(layers)
    page, generator = open_page(checkpoint), generator_of(checkpoint)
    for prompt, seed, temperature, top_k, top_p, min_p in [
            ("A bad", 0, 1.0, 0, 1.0, 0.0), ("", 7, 0.8, 0, 1.0, 0.0), ('("\n\n', 3, 1.3, 4, 1.0, 0.0),
            ("d", 2**63 - 1, 1.0, 0, 0.7, 0.0), ("e", 5, 1.5, 0, 1.0, 0.2), ("AB", 6, 2.0, 5, 0.9, 0.1),
            ("cab", 1, 0.0, 0, 1.0, 0.0)]:
        [wanted] = generator.generate(prompt, 120, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p,
                                      min_p=min_p)
        text = write(page, prompt, Seed=seed, Temperature=temperature, Top_k=top_k, Top_p=top_p, Min_p=min_p,
                     Length=120)
        assert text == prompt + wanted
        ids = page.evaluate(f"charGru.generateIds({js(prompt)}, {{length: 120, seed: '{seed}', topK: {top_k}, "
                            f"temperature: {temperature}, topP: {top_p}, minP: {min_p}}})")
        np.testing.assert_array_equal(ids, checkpoint.vocabulary.encode(wanted))


def test_uniform_numbers_are_those_of_numpy(open_page):
    page = open_page(model())
    for seed in (0, 1, 12345678901234567890 % 2**63, 2**63 - 1):
        wanted = np.random.Generator(np.random.Philox(key=seed)).random((21, 1), np.float32)[:, 0]
        numbers = page.evaluate(f"(() => {{ const numbers = charGru.uniforms({seed}n);"
                                "return Array.from({length: 21}, () => numbers.next().value); })()")
        assert numbers == wanted.tolist()


def test_page_draws_as_the_specification(open_page):
    """Ties, extreme temperatures, and all filters."""
    page, rng = open_page(model()), np.random.default_rng(1)
    for temperature, top_k, top_p, min_p in [
            (1, 0, 1, 0), (0, 0, 1, 0), (1e-40, 0, 1, 0), (1e-50, 3, 1, 0), (1e30, 2, 1, 0), (2, 3, 1, 0),
            (2, 1, 0.5, 0), (2, 0, 0.6, 0), (2, 0, 1, 0.3), (2, 9, 0.8, 0.1)]:
        logits = rng.integers(-3, 4, (40, 14)).astype(np.float32) / 2
        uniforms = rng.random(40, np.float32)
        uniforms[:2] = 0, 1 - 2**-24
        drawn = page.evaluate(
            f"{js(logits.tolist())}.map((row, k) => charGru.sample(new Float32Array(row), {js(uniforms.tolist())}[k], "
            f"{{temperature: {temperature}, topK: {top_k}, topP: {top_p}, minP: {min_p}}}))")
        np.testing.assert_array_equal(drawn, reference.sample(logits, uniforms, temperature, top_k, top_p, min_p))


def test_no_seed_writes_another_text_each_time_and_tells_the_seed(open_page):
    checkpoint = model()
    page, texts = open_page(checkpoint), []
    for _ in range(2):
        texts.append(write(page, "A", Length=80))
        seed = int(re.search(r"seed (\d+)", page.locator("#status").text_content())[1])
        assert texts[-1] == "A" + generator_of(checkpoint).generate("A", 80, seed=seed)[0]
    assert texts[0] != texts[1]


def test_stop_stops_and_the_text_can_be_looked_at(open_page):
    page = open_page(model(H=120))
    page.get_by_label("Length").fill("5000")
    page.evaluate("""new Promise((resolve) => {
        document.getElementById("write").click();
        const observer = new MutationObserver(() => {
            if (document.getElementById("text").childElementCount < 30) return;
            observer.disconnect();
            document.getElementById("stop").click();
            resolve();
        });
        observer.observe(document.getElementById("text"), {childList: true});
    })""")
    expect(page.locator("#status")).to_have_text(re.compile("^Stopped after"))
    text = page.locator("#text").text_content()
    assert 0 < len(text) < 5000 and page.locator("#units button").count() == 20
    page.evaluate("new Promise((resolve) => setTimeout(resolve, 100))")
    assert page.locator("#text").text_content() == text
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    assert write(page, "A", Length=3, Seed=1)[0] == "A"


def test_page_stays_responsive_while_it_writes(open_page):
    """The text grows in many steps, between which the browser handles events."""
    page = open_page(model(H=120))
    page.get_by_label("Length").fill("1500")
    lengths = page.evaluate("""new Promise((resolve) => {
        const lengths = [];
        document.getElementById("write").click();
        requestAnimationFrame(function frame() {
            lengths.push(document.getElementById("text").childElementCount);
            if (document.getElementById("stop").disabled) resolve(lengths);
            else setTimeout(frame, 0);
        });
    })""")
    assert lengths[-1] == 1500 and len(set(lengths)) > 4


def test_value_out_of_range_is_told_where_it_is(open_page):
    page = open_page(model())
    for label, value, wanted in [
            ("Temperature", "-1", "Temperature must be a finite number of at least 0."),
            ("Temperature", "", "Temperature must be a finite number of at least 0."),
            ("Top-k", "1.5", "Top-k must be a whole number of at least 0."),
            ("Top-p", "0", "Top-p must be above 0 and at most 1."), ("Min-p", "1.01", "Min-p must be from 0 to 1."),
            ("Length", "5001", "Length must be a whole number from 1 to 5,000."),
            ("Seed", str(2**63), "Seed must be a whole number from 0 to 2^63 - 1."),
            ("Seed", "x", "Seed must be a whole number from 0 to 2^63 - 1."),
            ("Unit", "26", "Unit must be a whole number from 0 to 25.")]:
        field = page.get_by_label(label, exact=True)
        before = field.input_value()
        field.fill(value)
        field.press("Enter")
        expect(page.locator("#status")).to_have_text(wanted)
        expect(field).to_be_focused()
        expect(field).to_have_attribute("aria-invalid", "true")
        assert page.locator("[aria-invalid]").count() == 1
        field.fill(before)
    assert page.locator("#text").text_content() == ""


# Reading

@pytest.mark.parametrize("weights, distance", [("fp32", 1e-5), ("fp16", 2e-3), ("int8", 5e-2)])
def test_loss_of_a_text_is_that_of_score(open_page, weights, distance):
    checkpoint = model()
    page, wanted = open_page(checkpoint, weights), generator_of(checkpoint).score(TEXT).loss
    read(page, TEXT)
    told = re.search(r"mean loss ([\d.]+) nats, ([\d.]+) bits", page.locator("#status").text_content())
    loss = page.evaluate(f"charGru.read({js(TEXT)}).loss")
    assert loss == pytest.approx(wanted, abs=distance)
    assert float(told[1]) == pytest.approx(loss, abs=6e-5)
    assert float(told[2]) == pytest.approx(loss / math.log(2), abs=6e-5)
    assert weights == "fp32" or abs(loss - wanted) > 1e-6
    assert page.locator("#text").text_content() == TEXT


@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_page_computes_with_weights_rounded_as_documented(open_page, weights):
    checkpoint = model()
    rounded = {}
    for name, array in checkpoint.params.items():
        scale = np.abs(array).max(axis=-1, keepdims=True) / 127
        held = array.astype(np.float16) if weights == "fp16" else np.rint(array / scale) * scale
        rounded[name] = array if name.startswith("b") else held.astype(np.float32)
    wanted = generator_of(replace(checkpoint, params=rounded)).score(TEXT).loss
    assert open_page(checkpoint, weights).evaluate(f"charGru.read({js(TEXT)}).loss") == pytest.approx(wanted, abs=1e-5)


def test_float16_of_every_size_is_read_as_it_is(open_page):
    """Subnormal numbers, both zeros, and the largest ones are embeddings of one number, whose product with a weight is
    what the candidate n is the tanh of; the weight of unit 1 is for large ones."""
    bits = [0, 1, 2, 1023, 1024, 1025, 15360, 31742, 31743] + list(range(77, 31744, 1511))
    values = np.array(bits + [0x8000 + k for k in bits], np.uint16).view(np.float16)
    sizes = Sizes(V=len(values) + 1, E=1, H=2)
    params = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(sizes).items()}
    params["W_emb"][1:, 0], params["W_ih.0"][4:, 0] = values, [1, 2**-14]
    characters = "".join(chr(0x4E00 + k) for k in range(len(values)))
    found = open_page(Checkpoint(sizes, Vocabulary(characters), params), "fp16").evaluate(
        f"(() => {{ const reading = charGru.read({js(characters)});"
        "return reading.ids.map((_, t) => [0, 1].map((unit) => reading.value('n', 0, unit, t))); })()")
    np.testing.assert_allclose(found, np.tanh(values[:, None] * [1, 2**-14]), rtol=1e-6)


def test_row_of_zeros_and_scales_survive_int8(open_page):
    checkpoint = model()
    checkpoint.params["W_hh.0"][3] = 0
    checkpoint.params["W_out"][4] *= 1e-3
    wanted = generator_of(checkpoint).score(TEXT).loss
    assert open_page(checkpoint, "int8").evaluate(f"charGru.read({js(TEXT)}).loss") == pytest.approx(wanted, abs=5e-2)


def test_surprisal_of_each_character_is_that_of_score(open_page):
    checkpoint = model()
    generator = generator_of(checkpoint)
    [part] = generator.score_parts([generator.ids_to_score(TEXT)])
    page = open_page(checkpoint)
    read(page, TEXT)
    first, *others = page.evaluate("charGru.shown().values")
    assert math.isnan(first)
    np.testing.assert_allclose(others, -part.characters.log_probabilities / math.log(2), atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_states_and_gates_are_those_of_the_specification(open_page, layers):
    checkpoint = model(layers)
    page = open_page(checkpoint)
    for (array, layer), wanted in states(checkpoint, TEXT).items():
        found = page.evaluate(
            f"(() => {{ const reading = charGru.read({js(TEXT)}); return reading.ids.map((_, t) => "
            f"Array.from({{length: {checkpoint.sizes.H}}}, (_, j) => reading.value('{array}', {layer}, j, t))); }})()")
        np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=f"{array}, layer {layer}")


def test_text_that_is_too_short_or_long_is_told(open_page):
    page = open_page(model())
    for text, wanted in [("", "at least two characters"),
                         ("a" * 5001, "has 5,001 characters; the page reads up to 5,000")]:
        page.get_by_label("A text to read").fill(text)
        page.get_by_role("button", name="Read").click()
        expect(page.locator("#status")).to_contain_text(wanted)
        assert page.locator("#text").text_content() == ""
    page.get_by_label("Prompt").fill("a" * 5001)
    page.get_by_role("button", name="Write").click()
    expect(page.get_by_label("Prompt")).to_have_attribute("aria-invalid", "true")


def test_unknown_characters_are_told_and_read_as_unk(open_page):
    checkpoint = model()
    page, text = open_page(checkpoint), "Ab🦊 x\u200bx c"
    read(page, text)
    assert page.locator("#unknown").text_content() == (
        "The model has not learnt x U+200B 🦊; read as [UNK], and underlined.")
    assert page.locator("#text .unknown").all_text_contents() == ["🦊", "x", "\u200b", "x"]
    wanted = generator_of(checkpoint).score(text, on_unknown="unk").loss
    assert page.evaluate(f"charGru.read({js(text)}).loss") == pytest.approx(wanted, abs=1e-5)
    [continued] = generator_of(checkpoint).generate("Ax", 30, seed=2, on_unknown="unk")
    assert write(page, "Ax", Seed=2, Length=30) == "Ax" + continued
    write(page, "A", Length=2)
    assert page.locator("#unknown").text_content() == ""


def test_line_ends_and_byte_order_mark_are_those_of_generate(open_page):
    checkpoint = model()
    wanted = generator_of(checkpoint).score("\ufeffA\r\nb\rc").loss
    assert open_page(checkpoint).evaluate('charGru.read("\\ufeffA\\r\\nb\\rc").loss') == pytest.approx(wanted, abs=1e-5)


# Inside

@pytest.mark.parametrize("array", "hrzn")
def test_unit_that_is_clicked_colours_the_text(open_page, array):
    checkpoint = model()
    page = open_page(checkpoint)
    read(page, TEXT)
    page.get_by_label("Layer").select_option("1")
    page.get_by_label("Colour by").select_option(array)
    button = page.locator("#units button").nth(2)
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    assert page.locator("#units [aria-pressed=true]").count() == 1
    unit = int(page.get_by_label("Unit", exact=True).input_value())
    assert str(unit) in button.get_attribute("aria-label")
    wanted = states(checkpoint, TEXT)[array, 1][:, unit]
    np.testing.assert_allclose(page.evaluate("charGru.shown().values"), wanted, atol=1e-5)
    colours = page.evaluate("[...document.querySelectorAll('#text span')].map("
                            "(span) => getComputedStyle(span).backgroundColor)")
    warm, cold = ([int(part) for part in page.evaluate(
        f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')").split()]
        for name in ("warm", "cold"))
    for value, colour in zip(wanted, colours, strict=True):
        *rgb, alpha = [float(part) for part in re.findall(r"[\d.]+", colour)] + [1.0] * colour.startswith("rgb(")
        assert rgb == (cold if value < 0 else warm) or abs(value) < 1e-3
        assert alpha == pytest.approx(abs(value), abs=6e-3)  # browsers keep alpha in 8 bits
    assert wanted.min() < 0 < wanted.max() if array in "hn" else wanted.min() > 0


def test_clicking_a_unit_under_surprisal_shows_its_state(open_page):
    page = open_page(model())
    read(page, TEXT)
    page.locator("#units button").first.click()
    expect(page.get_by_label("Colour by")).to_have_value("h")
    page.get_by_label("Colour by").select_option("surprisal")
    assert page.locator("#units [aria-pressed=true]").count() == 0


def test_properties_are_those_of_a_table_written_by_hand(open_page):
    text, *columns = zip(*PLACES)
    found = open_page(model()).evaluate(f"charGru.properties({js(''.join(text))})")
    assert list(found) == PROPERTIES
    for name, wanted in zip(PROPERTIES, columns, strict=True):
        assert values_of(found[name]) == list(wanted), name


def test_properties_are_those_of_look(open_page):
    rng, page = np.random.default_rng(3), open_page(model())
    pieces = list("aZ \"()[]{}“”\n\t\r.ǅß") + ["\n\n", "x" * 120, "🦊"]
    whites = [character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace()]
    for text in ("".join(rng.choice(pieces, 800)), "".join(whites) + "\ufeff\u200b\u180e", "", ")("):
        found, wanted = page.evaluate(f"charGru.properties({js(text)})"), properties(text)
        assert list(found) == list(wanted)
        for name, values in wanted.items():
            np.testing.assert_array_equal(values_of(found[name]), values, name)


def test_units_are_listed_by_their_correlation(open_page):
    checkpoint = model()
    page = open_page(checkpoint)
    read(page, TEXT)
    for layer in (0, 1):
        page.get_by_label("Layer").select_option(str(layer))
        h = states(checkpoint, TEXT)["h", layer]
        for name, values in properties(TEXT).items():
            page.get_by_label("that follow").select_option(name)
            wanted = np.corrcoef(h.T, values)[-1, :-1]
            found = values_of(page.evaluate(f"charGru.correlations(charGru.read({js(TEXT)}), {layer}, "
                                            f"charGru.properties({js(TEXT)})[{js(name)}])"))
            np.testing.assert_allclose(found, wanted, atol=1e-5)
            listed = page.locator("#units button").evaluate_all(
                "(buttons) => buttons.map((button) => button.innerText.split(/\\s+/))")
            ranked = np.argsort(-np.abs(wanted))[:20]
            assert [int(unit) for unit, _ in listed] == ranked.tolist()
            assert [r.replace("−", "-") for _, r in listed] == [f"{r:.2f}" for r in wanted[ranked]]


def test_property_without_variation_lists_no_unit(open_page):
    page = open_page(model())
    read(page, "bad dad")
    page.get_by_label("that follow").select_option("quotes")
    expect(page.locator("#explained")).to_contain_text("the same all through this text")
    assert page.locator("#units button").count() == 0


@pytest.mark.parametrize("by", ["pointer", "keyboard"])
def test_place_shows_the_five_likeliest_and_what_is_inside(open_page, by):
    checkpoint = model()
    page, generator, k = open_page(checkpoint), generator_of(checkpoint), 17
    read(page, TEXT)
    page.get_by_label("Layer").select_option("1")
    page.get_by_label("Colour by").select_option("z")
    page.get_by_label("Unit", exact=True).fill("9")
    page.get_by_label("Unit", exact=True).press("Tab")
    if by == "pointer":
        page.locator(f"[data-place='{k}']").hover()
    else:
        page.locator("[data-place='0']").focus()
        for _ in range(k):
            page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "place"
    place = page.get_by_role("tooltip")
    expect(place).to_be_visible()
    p, state = generator.next(TEXT[0])
    for character in TEXT[1:k + 1]:
        before, (p, state) = p, generator.next(character, state)
    names = {"\n": "new line", " ": "space"}
    likeliest = np.argsort(-p[0], kind="stable")[:5]
    assert place.locator(".character").all_text_contents() == [
        "[UNK]" if i == 0 else names.get(CHARACTERS[i - 1], CHARACTERS[i - 1]) for i in likeliest]
    assert place.locator(".share").all_text_contents() == [f"{100 * p[0, i]:.2f}%" for i in likeliest]
    bits = -math.log2(before[0, checkpoint.vocabulary.encode(TEXT[k])[0]])
    expect(place).to_contain_text(f"{names.get(TEXT[k], TEXT[k])} had {bits:.2f} bits of surprisal")
    expect(place).to_contain_text(f"z of unit 9, layer 1: {states(checkpoint, TEXT)['z', 1][k, 9]:.3f}")
    page.keyboard.press("Escape")
    expect(place).to_be_hidden()


# The page as a page

def test_vocabulary_and_text_of_markup_break_nothing(open_page):
    characters = "</script><!--&'\"\\\u2028🦊{}`$\x00"
    checkpoint = model(characters="".join(dict.fromkeys(characters)))
    page = open_page(checkpoint)
    [written] = generator_of(checkpoint).generate("</script><!--🦊", 200, seed=4)
    assert write(page, "</script><!--🦊", Seed=4, Length=200) == "</script><!--🦊" + written
    read(page, "<script>{{script}}</script><!--&quot;\u2028")
    assert page.locator("#text").text_content() == "<script>{{script}}</script><!--&quot;\u2028"
    assert page.locator("#text > :not(span)").count() == 0
    page.locator("[data-place='0']").hover()
    assert page.evaluate("document.scripts.length") == 2  # the model's sizes and the page's own


def test_keyboard_alone_writes_a_text_and_reaches_a_character(open_page):
    checkpoint = model(layers=1)
    page = open_page(checkpoint)

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches({js(selector)})"):
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
                return
        raise AssertionError(f"no Tab reaches {selector}")

    for selector, text in [("#prompt", "A b"), ("#temperature", "0.7"), ("#seed", "5"), ("#length", "90")]:
        tab_to(selector)
        page.keyboard.press("Control+A")
        page.keyboard.type(text)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(re.compile("^Wrote 90 characters with seed 5"))
    text = page.locator("#text").text_content()
    assert text == "A b" + generator_of(checkpoint).generate("A b", 90, seed=5, temperature=0.7)[0]
    tab_to("[data-place]")
    expect(page.get_by_role("tooltip")).to_contain_text("A is the first character")
    focused = "Number(document.activeElement.dataset.place)"
    for key, place in [("ArrowRight", 1), ("End", 92), ("ArrowRight", 92), ("ArrowLeft", 91), ("Home", 0),
                       ("ArrowUp", 0)]:
        page.keyboard.press(key)
        assert page.evaluate(focused) == place, key
    page.keyboard.press("ArrowDown")
    below = page.evaluate(focused)
    assert below == text.index("\n") + 1  # the start of the next line, under the start of this one
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) == 0
    tab_to("#units button")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Colour by")).to_have_value("h")


def test_page_is_as_wide_as_a_small_telephone(open_page):
    page = open_page(model())
    page.set_viewport_size({"width": 360, "height": 640})
    read(page, TEXT + "d" * 300)
    for k in (0, 11, 60, 200):
        page.locator(f"[data-place='{k}']").hover()
        box = page.get_by_role("tooltip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] >= 0 and box["y"] + box["height"] <= 640
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_page, scheme):
    """Main text, notes and labels, errors, buttons, and characters on the strongest colour of either sign; a weaker
    colour lies between the page's and the strongest one."""
    page = open_page(model())
    page.emulate_media(color_scheme=scheme)
    backgrounds = {name: page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')")
                   for name in ("warm", "cold")}

    def computed(selector: str, name: str) -> str:
        return page.locator(selector).first.evaluate(f"(element) => getComputedStyle(element).{name}")

    for selector in ("body", ".card", "#place", "textarea"):
        backgrounds[selector] = computed(selector, "backgroundColor")
    assert (luminance(backgrounds[".card"]) > 0.5) == (scheme == "light")
    pairs = [("body", "body"), ("#about", "body"), ("#unknown", "body"), ("#text", ".card"), ("label", ".card"),
             (".note", ".card"), ("#stop", ".card"), ("textarea", "textarea"), ("#place", "#place"), ("#text", "warm"),
             ("#text", "cold")]
    found = {pair: contrast(computed(pair[0], "color"), backgrounds[pair[1]]) for pair in pairs}
    found["#write"] = contrast(computed("#write", "color"), computed("#write", "backgroundColor"))
    assert all(ratio >= 4.5 for ratio in found.values()), found


def luminance(colour: str) -> float:
    """Relative luminance of an `rgb(...)`, as the Web Content Accessibility Guidelines define it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_control_has_a_label_and_only_lines_of_status_are_live(open_page):
    page = open_page(model())
    unnamed = page.evaluate("[...document.querySelectorAll('input, select, textarea')]"
                            ".filter((control) => !control.labels.length).map((control) => control.id)")
    assert unnamed == []
    assert page.evaluate("[...document.querySelectorAll('[role=status], [aria-live]')].map((one) => one.id)") == [
        "unknown", "status"]


def test_nothing_moves_where_less_motion_is_wanted(open_page):
    caret = "getComputedStyle(document.getElementById('text'), '::after').animationName"
    page = open_page(model())
    for motion, wanted in [("reduce", "none"), ("no-preference", "caret")]:
        page.emulate_media(reduced_motion=motion)
        assert page.evaluate(f"(document.getElementById('text').className = 'writing', {caret})") == wanted


def test_policy_blocks_everything_from_outside(open_page, logged):
    page = open_page(model())
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert logged == []
    for attempt in ("fetch('https://example.org/').then(() => 'loaded', () => 'blocked')",
                    "fetch('data:,x').then(() => 'loaded', () => 'blocked')"):
        assert page.evaluate(attempt) == "blocked"
    page.evaluate("document.head.append("
                  "Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))")
    assert page.evaluate("window.ran") is None
    assert logged and all("Content Security Policy" in line or "Fetch API cannot load" in line for line in logged)
    logged.clear()


@pytest.mark.parametrize("weights, most", [("fp32", 22), ("fp16", 12), ("int8", 6)])
def test_page_of_the_tutorials_size_is_small_and_tells_its_size(weights, most):
    params = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(TUTORIAL).items()}
    page = page_bytes(Checkpoint(TUTORIAL, Vocabulary("".join(map(chr, range(32, 97)))), params), weights)
    assert len(page) < most * 1e6
    described = json.loads(re.search(rb'id="model">(.*?)</script>', page)[1])
    assert float(described["megabytes"]) == pytest.approx(len(page) / 1e6, rel=0.01)
    assert (described["weights"], described["parameters"]) == (weights, 4_022_850)


def test_header_tells_sizes_and_weights(open_page):
    expect(open_page(model(), "int8").locator("#about")).to_have_text(re.compile(
        r"2 layers of 26 units, 12 characters, [\d,]+ parameters\. Weights int8, page 0\.0\d+ MB, no network\."))


def test_biases_stay_in_float32():
    checkpoint = model()
    for weights in ("fp16", "int8"):
        page = page_bytes(checkpoint, weights)
        for name, array in checkpoint.params.items():
            held = base64.b64decode(re.search(rf'id="{re.escape(name)}">([^<]*)<'.encode(), page)[1])
            width = 4 if name.startswith("b") else {"fp16": 2, "int8": 1}[weights]
            assert len(held) == width * array.size


def test_fp16_refuses_what_it_cannot_hold():
    checkpoint = model()
    checkpoint.params["W_hh.1"][4, 2] = -7e4
    with pytest.raises(UserError, match=r"^W_hh\.1 has values beyond 65,504.*--weights fp32$"):
        page_bytes(checkpoint, "fp16")
    page_bytes(checkpoint, "int8")


def test_command_writes_the_page(tmp_path, capsys):
    source, out = tmp_path / "model.safetensors", tmp_path / "page.html"
    save_checkpoint(source, model())
    assert commands.export([str(source), str(out)]) == 0
    assert Path(out).read_bytes() == page_bytes(model(), "fp16")
    assert commands.export([str(source), str(out), "--weights", "int8", "--force"]) == 0
    assert Path(out).read_bytes() == page_bytes(model(), "int8")


def test_model_of_bytes_is_refused(tmp_path, capsys):
    source = tmp_path / "model.safetensors"
    of_bytes = Vocabulary("".join(map(chr, range(model().sizes.V - 1))), of_bytes=True)
    save_checkpoint(source, replace(model(), vocabulary=of_bytes))
    assert commands.export([str(source), str(tmp_path / "page.html")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "is a model of bytes, which .html does not show" in line and ".safetensors" in line
    assert [*tmp_path.iterdir()] == [source]
