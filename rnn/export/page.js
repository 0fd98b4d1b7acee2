"use strict";
// The whole arithmetic and behaviour of the page, in three parts: the model, properties of texts, and the page itself.
//
// Axes: V vocabulary (id 0 is [UNK], id i is the character vocabulary[i - 1]), E embedding, H hidden units; gates lie
// r, z, n along 3H. Products are summed in float64; what the Python package keeps in float32 is rounded to float32.
//
// For the console and for tests, `charGru` has pure functions, which leave the page as it is:
//   generateIds(prompt, {temperature, topK, topP, minP, seed, length})   ids of the characters that continue the prompt
//   read(text)              a Reading of the text: ids, surprisal (bits), loss (nats), h(layer, t),
//                           value(array, layer, unit, t), likeliest(t)
//   properties(text)        name -> Float32Array, a value for each character
//   correlations(reading, layer, values)   of the state h of each unit with these values, Float64Array (H)
//   uniforms(seed)          iterator of the numbers that characters are drawn with
//   sample(logits, uniform, {temperature, topK, topP, minP})             id of the character drawn
//   shown()                 the text on the page, and the value behind each character's colour: {text, values}

window.charGru = (() => {
  // ---- The model ----------------------------------------------------------------------------------------------------

  const model = JSON.parse(document.getElementById("model").textContent);
  const { sizes: { V, H, E, layers }, vocabulary, weights } = model;
  const ids = new Map(vocabulary.map((character, index) => [character, index + 1]));

  /** The bytes of a data block, whose text is then dropped from the page. */
  function block(name) {
    const element = document.getElementById(name);
    const text = atob(element.textContent);
    element.remove();
    const bytes = new Uint8Array(text.length);
    for (let k = 0; k < bytes.length; k++) bytes[k] = text.charCodeAt(k);
    return bytes.buffer;
  }

  /** The value of a float16, given its 16 bits. */
  function half(bits) {
    const exponent = bits >> 10 & 31, fraction = (bits & 1023) / 1024;
    const size = exponent ? (1 + fraction) * 2 ** (exponent - 15) : fraction * 2 ** -14;
    return bits >> 15 ? -size : size;
  }

  /** A matrix as the page holds it, as Float32Array, row by row. */
  function matrix(name) {
    const held = block(name);
    if (weights === "fp32") return new Float32Array(held);
    const numbers = weights === "fp16" ? new Uint16Array(held) : new Int8Array(held);
    const result = new Float32Array(numbers.length);
    if (weights === "fp16") {
      const values = Float32Array.from({ length: 1 << 16 }, (_, bits) => half(bits));
      for (let k = 0; k < result.length; k++) result[k] = values[numbers[k]];
    } else {
      const scale = new Float32Array(block(`${name}.scale`)), columns = numbers.length / scale.length;
      for (let k = 0; k < result.length; k++) result[k] = numbers[k] * scale[Math.floor(k / columns)];
    }
    return result;
  }

  const vector = (name) => new Float32Array(block(name));
  const W_emb = matrix("W_emb"), W_out = matrix("W_out"), b_out = vector("b_out");
  const W_ih = [], W_hh = [], b_ih = [], b_hh = [];
  for (let layer = 0; layer < layers; layer++) {
    W_ih.push(matrix(`W_ih.${layer}`));
    W_hh.push(matrix(`W_hh.${layer}`));
    b_ih.push(vector(`b_ih.${layer}`));
    b_hh.push(vector(`b_hh.${layer}`));
  }

  /** Row `row` of W times x. */
  function dot(W, row, x) {
    let sum = 0;
    for (let column = 0, k = row * x.length; column < x.length; column++, k++) sum += W[k] * x[column];
    return sum;
  }

  /** W x + b. Shapes: W (rows, columns), x (columns,), b (rows,); result Float32Array (rows,). */
  function affine(W, x, b) {
    const rows = b.length, columns = x.length, result = new Float32Array(rows);
    let row = 0;
    for (; row + 3 < rows; row += 4) { // four rows together: their sums need not wait for one another
      const k0 = row * columns, k1 = k0 + columns, k2 = k1 + columns, k3 = k2 + columns;
      let sum0 = b[row], sum1 = b[row + 1], sum2 = b[row + 2], sum3 = b[row + 3];
      for (let column = 0; column < columns; column++) {
        const value = x[column];
        sum0 += W[k0 + column] * value;
        sum1 += W[k1 + column] * value;
        sum2 += W[k2 + column] * value;
        sum3 += W[k3 + column] * value;
      }
      result[row] = sum0;
      result[row + 1] = sum1;
      result[row + 2] = sum2;
      result[row + 3] = sum3;
    }
    for (; row < rows; row++) result[row] = b[row] + dot(W, row, x);
    return result;
  }

  /** The input products of layer 0 of a character, a row of the table P (V, 3H); computed once, when first read. */
  const P = [];
  const inputs = (id) => P[id] ??= affine(W_ih[0], W_emb.subarray(id * E, (id + 1) * E), b_ih[0]);

  const sigmoid = (x) => 0.5 * (1 + Math.tanh(0.5 * x));
  const zeroState = new Float32Array(H);

  /** The states, one (H,) for each layer, after reading a character in the states `before`. */
  function step(id, before) {
    const after = [];
    for (let layer = 0; layer < layers; layer++) {
      const h = before[layer], newH = new Float32Array(H);
      const i = layer ? affine(W_ih[layer], after[layer - 1], b_ih[layer]) : inputs(id);
      const a = affine(W_hh[layer], h, b_hh[layer]);
      for (let j = 0; j < H; j++) {
        const r = sigmoid(i[j] + a[j]), z = sigmoid(i[H + j] + a[H + j]);
        const n = Math.tanh(i[2 * H + j] + r * a[2 * H + j]);
        newH[j] = (1 - z) * n + z * h[j];
      }
      after.push(newH);
    }
    return after;
  }

  /** What the model does while it reads a text; t counts the characters read, from 0. */
  class Reading {
    ids = [];
    surprisal = []; // bits of each character, given all before it; NaN for the first one
    logits = null; // after the last character, Float32Array (V,)
    #states = [];
    #likeliest = [];
    #logSum = 0;

    read(id) {
      this.surprisal.push(this.ids.length ? (this.#logSum - this.logits[id]) / Math.LN2 : NaN);
      this.ids.push(id);
      this.#states.push(step(id, this.#states.at(-1) ?? Array(layers).fill(zeroState)));
      const logits = this.logits = affine(W_out, this.#states.at(-1)[layers - 1], b_out);
      let largest = -Infinity, sum = 0;
      for (const logit of logits) largest = Math.max(largest, logit);
      for (const logit of logits) sum += Math.exp(logit - largest);
      this.#logSum = largest + Math.log(sum);
      this.#likeliest.push(firstIds(logits, 5).map((id) => [id, Math.exp(logits[id] - this.#logSum)]));
    }

    /** Mean loss in nats per character, of all characters but the first. */
    get loss() {
      return this.surprisal.slice(1).reduce((sum, bits) => sum + bits, 0) * Math.LN2 / (this.ids.length - 1);
    }

    /** The state of a layer after character t, Float32Array (H,). */
    h(layer, t) {
      return t < 0 ? zeroState : this.#states[t][layer];
    }

    /** The value of a unit at character t, after reading it: array is h, or a gate: r, z or n. */
    value(array, layer, unit, t) {
      if (array === "h") return this.h(layer, t)[unit];
      const product = (W, gate, x, b) => Math.fround(b[gate * H + unit] + dot(W, gate * H + unit, x));
      const i = (gate) => layer ? product(W_ih[layer], gate, this.h(layer - 1, t), b_ih[layer])
        : inputs(this.ids[t])[gate * H + unit];
      const a = (gate) => product(W_hh[layer], gate, this.h(layer, t - 1), b_hh[layer]);
      if (array === "n") return Math.tanh(i(2) + sigmoid(i(0) + a(0)) * a(2));
      return array === "r" ? sigmoid(i(0) + a(0)) : sigmoid(i(1) + a(1));
    }

    /** The five likeliest characters after character t: a list of [id, probability]. */
    likeliest(t) {
      return this.#likeliest[t];
    }
  }

  /** Ids of the `count` largest logits, the largest first; equal ones in the order of ids. */
  function firstIds(logits, count) {
    const best = [];
    for (let id = 0; id < logits.length; id++) {
      if (best.length === count && logits[id] <= logits[best[count - 1]]) continue;
      let place = best.length;
      while (place > 0 && logits[id] > logits[best[place - 1]]) place--;
      best.splice(place, 0, id);
      best.length = Math.min(best.length, count);
    }
    return best;
  }

  /** Running sums, each rounded to float32. */
  function runningSums(values) {
    let sum = 0;
    return values.map((value) => sum = Math.fround(sum + value));
  }

  /** `sample` of rnn/reference.py for one row: the id of the character that a uniform number draws. */
  function sample(logits, uniform, { temperature = 1, topK = 0, topP = 1, minP = 0 }) {
    const known = logits.subarray(1), T = Math.fround(temperature);
    const largest = known.reduce((a, b) => Math.max(a, b));
    if (T === 0) return 1 + known.indexOf(largest);
    let p = known.map((logit) => Math.exp(Math.fround(Math.fround(logit - largest) / T)));
    if (topK || topP < 1) {
      const order = [...known.keys()].sort((a, b) => known[b] - known[a]); // stable
      const ranked = Float32Array.from(order, (index, rank) => !topK || rank < topK ? p[index] : 0);
      const reached = runningSums(ranked);
      const enough = Math.fround(Math.fround(topP) * reached.at(-1));
      p = new Float32Array(p.length);
      order.forEach((index, rank) => {
        if (topP >= 1 || (rank ? reached[rank - 1] : 0) < enough) p[index] = ranked[rank];
      });
    }
    const cumulative = runningSums(p.map((value) => value >= Math.fround(minP) ? value : 0));
    const wanted = Math.fround(uniform * cumulative.at(-1));
    return 1 + cumulative.findIndex((sum) => sum > wanted);
  }

  /** The float32 numbers of np.random.Generator(np.random.Philox(key=seed)).random(): Philox 4x64 of 10 rounds. */
  function* uniforms(seed) {
    const mask = 2n ** 64n - 1n;
    for (let counter = 1n; ; counter++) {
      let c = [counter, 0n, 0n, 0n], key = [BigInt(seed), 0n];
      for (let round = 0; round < 10; round++) {
        const a = 0xD2E7470EE14C6C93n * c[0], b = 0xCA5A826395121157n * c[2];
        c = [b >> 64n ^ c[1] ^ key[0], b & mask, a >> 64n ^ c[3] ^ key[1], a & mask];
        key = [key[0] + 0x9E3779B97F4A7C15n & mask, key[1] + 0xBB67AE8584CAA73Bn & mask];
      }
      for (const word of c) {
        for (const part of [word & 0xFFFFFFFFn, word >> 32n]) yield (Number(part) >>> 8) * 2 ** -24;
      }
    }
  }

  /** Characters of a text as the model has learnt texts: `as_learnt` of rnn/vocabulary.py. */
  function asLearnt(text) {
    if (!ids.has("\ufeff")) text = text.replace(/^\ufeff/, "");
    return [...ids.has("\r") ? text : text.replace(/\r\n?/g, "\n")];
  }

  const encode = (characters) => characters.map((character) => ids.get(character) ?? 0);

  /** Reads characters; yields after each. */
  function* readOn(reading, characters) {
    for (const id of encode(characters)) yield reading.read(id);
  }

  /** Reads a prompt, or the vocabulary's beginning if it is empty, and writes; yields after each character. */
  function* written(reading, characters, options) {
    const numbers = uniforms(options.seed);
    yield* readOn(reading, characters.length ? characters : [model.beginning]);
    for (let k = 0; k < options.length; k++) yield reading.read(sample(reading.logits, numbers.next().value, options));
  }

  // ---- What is asked for, and properties of texts -------------------------------------------------------------------

  const LIMIT = 5000;
  const whole = (least, most) => (value) => Number.isInteger(value) && value >= least && value <= most;
  const RULES = {
    temperature: ["Temperature", (value) => value >= 0 && value < Infinity, "a finite number of at least 0"],
    topK: ["Top-k", whole(0, 2 ** 53), "a whole number of at least 0"],
    topP: ["Top-p", (value) => value > 0 && value <= 1, "above 0 and at most 1"],
    minP: ["Min-p", (value) => value >= 0 && value <= 1, "from 0 to 1"],
    length: ["Length", whole(1, LIMIT), `a whole number from 1 to ${LIMIT.toLocaleString("en")}`],
    seed: ["Seed", (value) => /^\d{1,19}$/.test(value) && BigInt(value) < 2n ** 63n,
      "a whole number from 0 to 2^63 - 1"],
  };

  /** Options that cannot be used; `field` is the name of the option. */
  class Refused extends Error {
    constructor(field, message) {
      super(message);
      this.field = field;
    }
  }

  /** Options with their defaults. Throws Refused for one that is out of range. */
  function checked(options) {
    const all = { temperature: 1, topK: 0, topP: 1, minP: 0, seed: 0, length: 500, ...options };
    for (const [field, [name, allows, wanted]] of Object.entries(RULES)) {
      if (!allows(all[field])) throw new Refused(field, `${name} must be ${wanted}.`);
    }
    return all;
  }

  const PROPERTIES = {
    "line position": "the number of characters since the last new line, up to 100",
    case: "1 after a capital letter, 0 after a small one, until the next letter",
    quotes: "1 inside double quotes, else 0",
    brackets: "1 inside ( ), [ ] or { }, else 0",
    spaces: "1 at white space, else 0",
  };

  /** Name -> Float32Array: what holds after each character of a text. */
  function properties(text) {
    const characters = [...text];
    const found = Object.keys(PROPERTIES).map(() => new Float32Array(characters.length));
    let position = 0, upper = 0, quoted = 0, depth = 0;
    characters.forEach((c, t) => {
      position = c === "\n" ? 0 : Math.min(100, position + 1);
      if (c.toLowerCase() !== c.toUpperCase()) upper = Number(c !== c.toLowerCase());
      if (c === '"') quoted = 1 - quoted;
      if (c === "“" || c === "”") quoted = Number(c === "“");
      if ("([{".includes(c)) depth++;
      if (")]}".includes(c)) depth = Math.max(0, depth - 1);
      if (c === "\n" && characters[t - 1] === "\n") quoted = depth = 0;
      const space = Number(/^([^\S\ufeff]|[\x1c-\x1f\x85])$/.test(c)); // as str.isspace of Python
      [position, upper, quoted, Number(depth > 0), space].forEach((value, k) => found[k][t] = value);
    });
    return Object.fromEntries(Object.keys(PROPERTIES).map((name, k) => [name, found[k]]));
  }

  /**
   * Pearson's correlation of each unit's state with values; 0 where either is constant. Value k is that of character
   * first + k. Shapes: values (N,); result Float64Array (H,).
   */
  function correlations(reading, layer, values, first = 0) {
    const N = values.length, mean = new Float64Array(H), hh = new Float64Array(H), hv = new Float64Array(H);
    const start = reading.h(layer, first); // states count from it, so that one without variation has hh 0 exactly
    const valuesMean = values.reduce((sum, value) => sum + value, 0) / N;
    for (let t = 0; t < N; t++) reading.h(layer, first + t).forEach((h, j) => mean[j] += (h - start[j]) / N);
    let vv = 0;
    for (let t = 0; t < N; t++) {
      const v = values[t] - valuesMean, state = reading.h(layer, first + t);
      vv += v * v;
      for (let j = 0; j < H; j++) {
        const h = state[j] - start[j] - mean[j];
        hh[j] += h * h;
        hv[j] += h * v;
      }
    }
    return hv.map((sum, j) => hh[j] * vv > 0 ? sum / Math.sqrt(hh[j] * vv) : 0);
  }

  /** A Reading of a text. */
  function read(text) {
    const reading = new Reading();
    for (const _ of readOn(reading, asLearnt(text)));
    return reading;
  }

  /** Ids of the characters that continue a prompt. Throws Refused for options out of range. */
  function generateIds(prompt, options = {}) {
    const reading = new Reading(), all = checked(options);
    for (const _ of written(reading, asLearnt(prompt), all));
    return reading.ids.slice(-all.length);
  }

  // ---- The page -----------------------------------------------------------------------------------------------------

  const SLICE = 12; // milliseconds of computing between two frames
  const SHOWN_UNITS = 20;
  const MOST_BITS = 8; // surprisal of the strongest colour
  const at = (id) => document.getElementById(id);
  const number = (value, digits = 0) => value.toLocaleString("en",
    { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");

  function make(tag, className = "", text = "") {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.textContent = text;
    return element;
  }

  /** How a character is called where it stands alone. */
  function nameOf(character) {
    const names = { "\n": "new line", " ": "space", "\t": "tab" };
    const code = `U+${character.codePointAt().toString(16).toUpperCase().padStart(4, "0")}`;
    return names[character] ?? (/[\p{C}\p{Z}]/u.test(character) ? code : character);
  }

  const nameOfId = (id) => id ? nameOf(vocabulary[id - 1]) : "[UNK]";

  // The text on the page: its characters, their elements, and the reading, of which character `first` is the first
  // one shown (1 after an empty prompt, where the model has read the vocabulary's beginning).
  const view = { reading: new Reading(), first: 0, characters: [], spans: [], prompt: 0 };
  const chosen = { array: "surprisal", layer: 0, unit: 0 };
  let job = null; // what is being written or read: an iterator that yields after each character
  let pointed = null; // the element whose place is shown

  function tell(message, wrong = false) {
    at("status").textContent = message;
    at("told").classList.toggle("wrong", wrong);
  }

  function tellUnknown(characters) {
    const unknown = [...new Set(characters.filter((character) => !ids.has(character)))].sort();
    const more = unknown.length > 20 ? ` and ${number(unknown.length - 20)} more` : "";
    at("unknown").textContent = unknown.length
      ? `The model has not learnt ${unknown.slice(0, 20).map(nameOf).join(" ")}${more}; read as [UNK], and underlined.`
      : "";
  }

  const shownText = () => view.characters.slice(0, view.spans.length).join("");

  /** The value that colours place k of the text shown. */
  function valueAt(k) {
    const { array, layer, unit } = chosen;
    const t = view.first + k;
    return array === "surprisal" ? view.reading.surprisal[t] : view.reading.value(array, layer, unit, t);
  }

  function colour(k) {
    const value = valueAt(k), style = view.spans[k].style;
    const strength = Math.min(1, Math.abs(value) / (chosen.array === "surprisal" ? MOST_BITS : 1)) || 0;
    style.backgroundColor = `rgb(var(${value < 0 ? "--cold" : "--warm"}) / ${strength.toFixed(3)})`;
  }

  function colourAll() {
    const { array, layer, unit } = chosen, both = array === "h" || array === "n";
    at("array").value = array;
    at("layer").value = layer;
    at("unit").value = unit;
    at("least").textContent = array === "surprisal" ? "0 bits" : both ? "−1" : "0";
    at("most").textContent = array === "surprisal" ? `${MOST_BITS} or more` : "1";
    at("scale").className = both ? "both" : "up";
    view.spans.forEach((_, k) => colour(k));
    for (const button of at("units").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", array !== "surprisal" && Number(button.dataset.unit) === unit);
    }
  }

  /** Show the characters that the model has read since the last call. */
  function grow() {
    const text = at("text"), newSpans = document.createDocumentFragment();
    const follow = text.scrollTop + text.clientHeight > text.scrollHeight - 40;
    for (let k = view.spans.length; k < view.reading.ids.length - view.first; k++) {
      const id = view.reading.ids[view.first + k];
      const character = view.characters[k] ??= vocabulary[id - 1];
      const span = make("span", k < view.prompt ? "prompt" : "", character), name = nameOf(character);
      if (id === 0) span.classList.add("unknown");
      if (character === "\n") span.dataset.sign = "↵";
      else if (name.startsWith("U+")) span.dataset.sign = name;
      span.dataset.place = k;
      span.tabIndex = k ? -1 : 0;
      view.spans.push(span);
      colour(k);
      newSpans.append(span);
    }
    text.append(newSpans);
    if (follow) text.scrollTop = text.scrollHeight;
  }

  function listUnits() {
    const property = at("property").value;
    const values = properties(shownText())[property];
    const r = values.length ? correlations(view.reading, chosen.layer, values, view.first) : [];
    const units = [...r.keys()].filter((unit) => r[unit]).sort((a, b) => Math.abs(r[b]) - Math.abs(r[a]));
    at("explained").textContent = "r is Pearson’s correlation of a unit’s state h with this property: "
      + `${PROPERTIES[property]}.`
      + (values.length && !units.length ? " It is the same all through this text." : "");
    at("units-head").hidden = !units.length;
    at("units").replaceChildren(...units.slice(0, SHOWN_UNITS).map((unit) => {
      const item = make("li"), button = make("button"), bar = make("span", r[unit] < 0 ? "bar negative" : "bar");
      button.type = "button";
      button.dataset.unit = unit;
      button.setAttribute("aria-label", `unit ${unit}, r ${number(r[unit], 2)}`);
      bar.style.width = `${100 * Math.abs(r[unit])}%`;
      button.append(make("span", "", unit), make("span", "", number(r[unit], 2)), bar);
      item.append(button);
      return item;
    }));
    colourAll();
  }

  /** Work on a text in slices between frames, until it ends or another job takes its place. */
  function work(steps, ended) {
    const began = performance.now();
    at("stop").disabled = false;
    at("text").classList.add("writing");
    at("units").replaceChildren();
    job = { ended: (stopped) => {
      job = null;
      if (document.activeElement === at("stop")) at("write").focus();
      at("stop").disabled = true;
      at("text").classList.remove("writing");
      listUnits();
      ended(stopped, (performance.now() - began) / 1000);
    } };
    const mine = job;
    requestAnimationFrame(function slice() {
      if (job !== mine) return;
      const end = performance.now() + SLICE;
      let done = false;
      while (!done && performance.now() < end) ({ done } = steps.next());
      grow();
      if (done) mine.ended(false);
      else requestAnimationFrame(slice);
    });
  }

  /** Begin a new text on the page, of which so many characters are a prompt. */
  function begin(characters, first, prompt) {
    hidePlace();
    Object.assign(view, { reading: new Reading(), first, characters, spans: [], prompt });
    at("text").replaceChildren();
    tellUnknown(characters);
  }

  /** Mark no field as wrong any more. */
  function accept() {
    document.querySelectorAll("[aria-invalid]").forEach((field) => field.removeAttribute("aria-invalid"));
    if (at("told").classList.contains("wrong")) tell("");
  }

  function refuse(field, message) {
    accept();
    at(field).setAttribute("aria-invalid", "true");
    at(field).focus();
    tell(message, true);
  }

  /** Whether a text is short enough; says so if it is not. */
  function fits(field, characters) {
    if (characters.length <= LIMIT) return true;
    refuse(field, `This text has ${number(characters.length)} characters; the page reads up to ${number(LIMIT)}.`);
    return false;
  }

  function write() {
    const characters = asLearnt(at("prompt").value), seed = at("seed").value.trim();
    const given = Object.fromEntries(["temperature", "topK", "topP", "minP", "length"].map(
      (field) => [field, at(field).valueAsNumber]));
    let options;
    try {
      options = checked({ ...given, seed: seed || String(crypto.getRandomValues(new Uint32Array(1))[0]) });
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      return refuse(error.field, error.message);
    }
    if (!fits("prompt", characters)) return;
    const first = characters.length ? 0 : 1, prompt = characters.length;
    begin(characters, first, prompt);
    tell(`Writing with seed ${options.seed}.`);
    work(written(view.reading, characters, options), (stopped, seconds) => {
      const count = Math.max(0, view.spans.length - prompt);
      tell(`${stopped ? "Stopped after" : "Wrote"} ${number(count)} characters with seed ${options.seed}, `
        + `${number(view.reading.ids.length / seconds)} characters per second.`);
    });
  }

  function readGiven() {
    const characters = asLearnt(at("given").value);
    if (characters.length < 2) return refuse("given", "Give at least two characters: the first is not scored.");
    if (!fits("given", characters)) return;
    begin(characters, 0, 0);
    tell("Reading.");
    const { reading } = view;
    work(readOn(reading, characters), (stopped) => {
      const loss = reading.ids.length < 2 ? "" : `: mean loss ${number(reading.loss, 4)} nats, `
        + `${number(reading.loss / Math.LN2, 4)} bits per character`;
      tell(`${stopped ? "Stopped after" : "Read"} ${number(reading.ids.length)} characters${loss}.`);
    });
  }

  /** Show what the model expects after a character, beside it. */
  function showPlace(span) {
    const k = Number(span.dataset.place), t = view.first + k, { layer, unit } = chosen;
    const array = chosen.array === "surprisal" ? "h" : chosen.array, bits = view.reading.surprisal[t];
    const head = make("p"), list = make("div", "places"), place = at("place");
    head.append(make("strong", "", nameOf(view.characters[k])),
      Number.isNaN(bits) ? " is the first character" : ` had ${number(bits, 2)} bits of surprisal`);
    const value = `${array} of unit ${unit}, layer ${layer}: ${number(view.reading.value(array, layer, unit, t), 3)}`;
    for (const [id, p] of view.reading.likeliest(t)) {
      const bar = make("span", "bar");
      bar.style.width = `${100 * p}%`;
      list.append(make("span", "character", nameOfId(id)), make("span", "share", `${number(100 * p, 2)}%`), bar);
    }
    place.replaceChildren(head, make("p", "value", value), make("p", "note", "The likeliest after it:"), list);
    place.hidden = false;
    pointed = span;
    movePlace();
  }

  function movePlace() {
    if (!pointed) return;
    const place = at("place"), box = pointed.getClientRects()[0], edge = 8;
    const left = Math.min(box.left, document.documentElement.clientWidth - place.offsetWidth - edge);
    const below = box.bottom + edge;
    const top = below + place.offsetHeight < innerHeight ? below : box.top - edge - place.offsetHeight;
    place.style.left = `${Math.max(edge, left)}px`;
    place.style.top = `${Math.max(0, top)}px`;
  }

  function hidePlace() {
    pointed = null;
    at("place").hidden = true;
  }

  /** The place, in the line above or below (step -1 or 1), that is nearest to place k. */
  function inNextLine(k, step) {
    const { spans } = view, { offsetTop: line, offsetLeft: x } = spans[k];
    const away = (place) => Math.abs(spans[place].offsetLeft - x);
    let place = k;
    while (spans[place]?.offsetTop === line) place += step;
    if (!spans[place]) return k;
    const next = spans[place].offsetTop;
    let best = place;
    for (; spans[place]?.offsetTop === next; place += step) if (away(place) < away(best)) best = place;
    return best;
  }

  function moveFocus(event) {
    const k = Number(event.target.dataset.place), last = view.spans.length - 1;
    const moves = {
      ArrowLeft: () => Math.max(0, k - 1), ArrowRight: () => Math.min(last, k + 1), Home: () => 0, End: () => last,
      ArrowUp: () => inNextLine(k, -1), ArrowDown: () => inNextLine(k, 1),
    };
    if (!moves[event.key] || Number.isNaN(k)) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    const span = view.spans[moves[event.key]()];
    span.tabIndex = 0;
    span.focus();
  }

  function choose(change) {
    Object.assign(chosen, change);
    accept();
    colourAll();
  }

  function listen() {
    const on = (id, type, listener) => at(id).addEventListener(type, listener);
    const submitted = (start) => (event) => {
      event.preventDefault();
      accept();
      start();
    };
    on("writing", "submit", submitted(write));
    on("reading", "submit", submitted(readGiven));
    on("stop", "click", () => job?.ended(true));
    on("array", "change", (event) => choose({ array: event.target.value }));
    on("property", "change", listUnits);
    on("layer", "change", (event) => {
      chosen.layer = Number(event.target.value);
      listUnits();
    });
    const unitArray = () => chosen.array === "surprisal" ? "h" : chosen.array;
    on("unit", "change", (event) => {
      const unit = event.target.valueAsNumber;
      if (whole(0, H - 1)(unit)) choose({ array: unitArray(), unit });
      else refuse("unit", `Unit must be a whole number from 0 to ${number(H - 1)}.`);
    });
    on("units", "click", (event) => {
      const button = event.target.closest("button");
      if (button) choose({ array: unitArray(), unit: Number(button.dataset.unit) });
    });
    const spanOf = (event) => event.target.closest("[data-place]");
    on("text", "pointerover", (event) => spanOf(event) ? showPlace(spanOf(event)) : hidePlace());
    on("text", "pointerleave", hidePlace);
    on("text", "focusin", (event) => {
      event.target.setAttribute("aria-describedby", "place");
      showPlace(event.target);
    });
    on("text", "focusout", (event) => {
      event.target.removeAttribute("aria-describedby");
      hidePlace();
    });
    on("text", "keydown", moveFocus);
    document.addEventListener("keydown", (event) => event.key === "Escape" && hidePlace());
    addEventListener("scroll", movePlace, { capture: true, passive: true });
    addEventListener("resize", movePlace);
  }

  at("about").textContent = `A GRU that writes character by character: ${number(layers)} `
    + `${layers === 1 ? "layer" : "layers"} of ${number(H)} units, ${number(V - 1)} characters, `
    + `${number(model.parameters)} parameters. Weights ${weights}, page ${model.megabytes} MB, no network.`;
  at("layer").append(...W_hh.map((_, layer) => make("option", "", layer)));
  at("layer").parentElement.hidden = layers === 1;
  at("unit").max = H - 1;
  at("property").append(...Object.keys(PROPERTIES).map((name) => make("option", "", name)));
  listen();
  listUnits();

  const shown = () => ({ text: shownText(), values: view.spans.map((_, k) => valueAt(k)) });
  return { generateIds, read, properties, correlations, uniforms, sample, shown };
})();
