"""Loads checkpoints that were altered as a broken disk, a torn copy or a stranger may alter them.

    python -m tests.campaigns.checkpoints            # 10,000 of them
    python -m tests.campaigns.checkpoints 200 --seed 3

Each altered file must be refused in one line that names it, or load as the checkpoint that the safetensors library
finds in it: an unchanged one, unless the file's checksum was computed anew. Loading may take SECONDS of CPU time, and
this process MIB of memory meanwhile. Every hundredth file also goes through `generate.py`. Exit status 1, and the file
is kept, if one of this fails.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import numpy as safetensors_numpy

from char_gru.rnn import checkpoint as module
from char_gru.rnn.checkpoint import METADATA_KEY, Checkpoint, Resumable, load_checkpoint, save_checkpoint
from char_gru.rnn.config import Sizes, TrainConfig, UserError
from char_gru.rnn.params import parameter_shapes
from char_gru.rnn.vocabulary import Vocabulary
from tests.campaigns.children import options_of
from tests.helpers.commands import DEADLINE, ROOT, environment

SECONDS, MIB = 1.0, 300

MODELS = (("\n abcdé🦊", 4, 5, 1, True), ("\n ab", 3, 4, 2, False), ("\n abc", 64, 128, 1, True),
          ("".join(map(chr, range(0x4E00, 0x9000))), 4, 8, 1, False))
"""Characters, E, H, layers of the checkpoints, and whether they can be resumed."""

NUMBERS = (0, 1, -1, 2, 7, 255, 2**31, 2**63, 2**64, 10**30, -10**30, 0.5, 1e300, 1e999, float("nan"))
VALUES = (*NUMBERS, None, True, "", "x", "\ud800", [], [[]], {}, {"a": []}, [1, 2], "[UNK]" * 50)


def example(characters: str, E: int, H: int, layers: int, resumable: bool) -> Checkpoint:
    """A checkpoint of random values."""
    rng, sizes = np.random.default_rng(H), Sizes(len(characters) + 1, E, H, layers)

    def arrays() -> dict[str, np.ndarray]:
        return {name: rng.standard_normal(shape, np.float32) for name, shape in parameter_shapes(sizes).items()}

    progress = {"step": 7, "epoch": 0, "batch": 7, "loss_sum": 20.5, "text_sha256": "0" * 64,
                "config": TrainConfig(data=("text.txt",)).saved()}
    state = rng.standard_normal((layers, 3, H), np.float32)
    return Checkpoint(sizes, Vocabulary(characters), arrays(),
                      Resumable(arrays(), arrays(), state, progress) if resumable else None)


def parts(raw: bytes) -> tuple[dict, bytes]:
    """The header of a checkpoint, and the bytes of its tensors."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def file_of(header: dict | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


# Damage, each a function of the random source and a file's bytes

def bytes_changed(rng: random.Random, raw: bytes) -> bytes:
    damaged = bytearray(raw)
    end = rng.choice((8, 8 + int.from_bytes(raw[:8], "little"), len(raw)))
    for _ in range(rng.choice((1, 1, 2, 8))):
        damaged[rng.randrange(end)] = rng.randrange(256)
    return bytes(damaged)


def cut(rng: random.Random, raw: bytes) -> bytes:
    return raw[:rng.choice((rng.randrange(len(raw)), rng.randrange(20), len(raw) - 1 - rng.randrange(20)))]


def longer(rng: random.Random, raw: bytes) -> bytes:
    return raw + rng.choice((b"\0", b"\0" * 4096, rng.randbytes(rng.randrange(1, 5000)), raw))


def blocks_lost(rng: random.Random, raw: bytes) -> bytes:
    size = rng.choice((16, 512, 4096))
    start = rng.randrange(len(raw)) // size * size
    return raw[:start] + rng.choice((bytes(len(raw[start:start + size])), b"", raw[:size])) + raw[start + size:]


def blocks_exchanged(rng: random.Random, raw: bytes) -> bytes:
    size = rng.choice((1, 16, 512))
    first, second = sorted(rng.randrange(len(raw)) for _ in range(2))
    second = max(second, first + size)
    return (raw[:first] + raw[second:second + size] + raw[first + size:second] + raw[first:first + size]
            + raw[second + size:])


def length_forged(rng: random.Random, raw: bytes) -> bytes:
    length = rng.choice((0, 1, 2, 96 << 20, 2**31, 2**32, 2**63, 2**64 - 1, len(raw), len(raw) - 8,
                         int.from_bytes(raw[:8], "little") + rng.randrange(-9, 9)))
    return length.to_bytes(8, "little") + raw[8:]


def header_flooded(rng: random.Random, raw: bytes) -> bytes:
    """A header of up to 64 MB of JSON, mostly well-formed, often in front of as many bytes of tensors."""
    size, (header, data) = int(64e6 ** rng.uniform(0.2, 1)), parts(raw)
    item = rng.choice(("[]", "{}", '"ab"', "1e9", "9", '"\\u00e9"', '{"a":[]}', "null", "[" * 900 + "]" * 900))
    many = "[" + f"{item}," * (size // len(item)) + item + "]"
    named = ",".join(f'"{number}":{item}' for number in range(size // (len(item) + 9)))
    empty = ",".join(f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(size // 60))
    whole, metadata = json.dumps(header)[:-1], header["__metadata__"]
    place = rng.randrange(8)
    if place < 5:
        flooded = (f'{whole},"x":{many}}}', f'{whole},"x":{{{named}}}}}', f"{whole},{empty}}}", many,
                   "[" * size)[place]
    else:
        text = metadata[METADATA_KEY]
        metadata[METADATA_KEY] = (f'{text[:-1]},"x":{many}}}', f'{text[:-1]},"x":{{{named}}}}}',
                                  text.replace('"vocabulary": "', '"vocabulary": "' + "z" * size))[place - 5]
        flooded = json.dumps(header)
    return file_of(flooded.encode(), data + bytes(size * rng.randrange(2)))


def entry_forged(rng: random.Random, raw: bytes) -> bytes:
    header, data = parts(raw)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, begin = header[name], header[name]["data_offsets"][0]
    key, value = rng.choice((
        ("dtype", rng.choice(("F64", "I32", "F16", "BOOL", "", "f32", None, 5))), ("shape", rng.choice(VALUES)),
        ("shape", [rng.choice(NUMBERS) for _ in range(rng.randrange(4))]), ("data_offsets", rng.choice(VALUES)),
        ("data_offsets", [rng.choice((begin, *NUMBERS)), rng.choice((begin, *NUMBERS))]), ("x", rng.choice(VALUES))))
    entry[key] = value
    if not rng.randrange(4):
        header[rng.choice(("x", "state", "output.bias", "adam.m.x"))] = header.pop(name)
    return file_of(header, data)


def description_forged(rng: random.Random, raw: bytes) -> bytes:
    header, data = parts(raw)
    text = header["__metadata__"][METADATA_KEY]
    depth = rng.choice((10, 900, 1100, 5000, 100_000))
    header["__metadata__"][METADATA_KEY] = rng.choice((
        text[:rng.randrange(len(text))], text.replace(":", ": " + "[" * depth, 1),
        text.replace("{", '{"a": ' * depth, 1), "[" * depth + "]" * depth, '{"a": ' + "9" * depth + "," + text[1:],
        text.replace(": 1", ": NaN"), text.replace(": 1", ": 1e999"), text.replace(", ", ', "sizes": {}, ', 1), "",
        "null", "1" * depth))
    return file_of(header, data)


# Forgery with a checksum computed anew: each changes a description and tensors

def value_replaced(rng: random.Random, description: dict, tensors: dict[str, np.ndarray]) -> None:
    places = [description, description["sizes"]]
    if description["progress"]:
        places += [description["progress"], description["progress"]["config"]]
    place = rng.choice(places)
    key = rng.choice([*place, "x"])
    if rng.randrange(3):
        place[key] = rng.choice(VALUES)
    else:
        place.pop(key, None)


def vocabulary_changed(rng: random.Random, description: dict, tensors: dict[str, np.ndarray]) -> None:
    known = description["vocabulary"]
    description["vocabulary"] = rng.choice((known[::-1], known[1:], known + "\U0010ffff", known[0] * len(known),
                                            known[:-1] + "\U0010ffff", list(known), "\0" + known[1:]))


def tensor_changed(rng: random.Random, description: dict, tensors: dict[str, np.ndarray]) -> None:
    name, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    array = tensors[name]
    changes: list[Callable[[], np.ndarray]] = [
        lambda: array.astype(np.float64), lambda: array.astype(np.float16), lambda: array.view(np.int32),
        lambda: array[None], lambda: array.T.copy(), lambda: array[:-1], lambda: array[:0], lambda: array.reshape(-1),
        lambda: np.where(array == array.max(), np.float32(rng.choice((np.nan, np.inf, -np.inf, 0, 1e38))), array),
        lambda: -array, lambda: tensors[other]]
    tensors[name] = rng.choice(changes)()


def tensors_renamed(rng: random.Random, description: dict, tensors: dict[str, np.ndarray]) -> None:
    name = rng.choice(sorted(tensors))
    change = rng.randrange(3)
    if change:
        tensors[rng.choice(("x", "state", "output.bias", "adam.m.output.bias", f"{name}_l1"))] = tensors[name]
    if change != 1:
        del tensors[name]


DAMAGE = (bytes_changed, cut, longer, blocks_lost, blocks_exchanged, length_forged, header_flooded, entry_forged,
          description_forged)
FORGERY = (value_replaced, vocabulary_changed, tensor_changed, tensors_renamed)


def forged(rng: random.Random, raw: bytes, change: Callable) -> bytes:
    """A file with a description and tensors that a function changed, and with the checksum that they have."""
    header, _ = parts(raw)
    description = json.loads(header["__metadata__"][METADATA_KEY])
    del description["sha256"]
    tensors = {name: array.copy() for name, array in safetensors_numpy.load(raw).items()}
    change(rng, description, tensors)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    description["sha256"] = module._digest(description, tensors)
    return safetensors_numpy.save(tensors, {METADATA_KEY: json.dumps(description)})


def held(raw: bytes) -> tuple[dict, dict[str, bytes]]:
    """The description and the tensors' bytes that the safetensors library and json find in a checkpoint."""
    description = json.loads(parts(raw)[0]["__metadata__"][METADATA_KEY])
    return description, {name: array.tobytes() for name, array in safetensors_numpy.load(raw).items()}


class Peak:
    """The most memory that this process has had since it was last asked, in MiB, as Linux counts it."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def mib(self) -> float:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024


def check_loading(path: Path, original: bytes | None) -> tuple[str, float, float]:
    """Load a file; returns how that ended, the CPU time in seconds, and this process's peak of memory in MiB.

    original: the bytes before the file was altered, if it may only load unchanged.

    Raises: AssertionError.
    """
    peak, began, loaded, refusal = Peak(), time.process_time(), None, ""
    try:
        loaded = load_checkpoint(path)
    except UserError as error:
        refusal = str(error)
    seconds, mib = time.process_time() - began, peak.mib()
    assert seconds < SECONDS and mib < MIB, f"took {seconds:.2f} s and {mib:.0f} MiB"
    if loaded is None:
        assert str(path) in refusal and len(refusal.splitlines()) == 1, refusal
        return "refused", seconds, mib
    tensors, resumable = module._tensors(loaded), loaded.resumable
    description, arrays = held(path.read_bytes() if original is None else original)
    assert {name: array.tobytes() for name, array in tensors.items()} == arrays, "other tensors were loaded"
    assert vars(loaded.sizes) == vars(Sizes(**description["sizes"])), "other sizes were loaded"
    assert loaded.vocabulary.characters == description["vocabulary"], "other characters were loaded"
    assert loaded.vocabulary.beginning == description.get("beginning", "\n"), "another beginning was loaded"
    assert (resumable.progress if resumable else None) == description["progress"], "other progress was loaded"
    return "unchanged" if original is not None else "loaded", seconds, mib


def check_command(path: Path, refused: bool) -> None:
    """Give a file to `generate.py`.

    Raises: AssertionError.
    """
    done = subprocess.run([sys.executable, ROOT / "generate.py", path, "--length", "1", "--seed", "1"], check=False,
                          capture_output=True, text=True, env=environment(), timeout=DEADLINE)
    lines = len(done.stderr.splitlines())
    assert (done.returncode, lines) == ((2, 1) if refused else (0, 0)), f"{done.returncode}\n{done.stderr}"


def main() -> int:
    options = options_of("checkpoints", __doc__, 10_000, "altered checkpoints")
    rng, folder, ends = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="checkpoints-")), Counter()
    originals, longest, most, path = [], 0.0, 0.0, folder / "altered.safetensors"
    for model in MODELS:
        save_checkpoint(path, example(*model))
        originals.append(path.read_bytes())
    kinds = (*DAMAGE, *FORGERY)
    for number in range(options.count):
        kind, raw = kinds[number % len(kinds)], originals[rng.randrange(len(MODELS))]
        path.write_bytes(kind(rng, raw) if kind in DAMAGE else forged(rng, raw, kind))
        try:
            end, seconds, mib = check_loading(path, raw if kind in DAMAGE else None)
            if number % 100 == 0:
                check_command(path, end == "refused")
        except Exception as error:  # noqa: BLE001 any other error is a finding, too
            print(f"{type(error).__name__}: {error}\nfile {number}, {kind.__name__}: {path}")
            return 1
        ends[end] += 1
        longest, most = max(longest, seconds), max(most, mib)
    shutil.rmtree(folder)
    print(f"{options.count:,} altered checkpoints: {ends['refused']:,} refused, {ends['unchanged']:,} loaded "
          f"unchanged, {ends['loaded']:,} with a new checksum loaded as they say; at most {longest:.2f} s and "
          f"{most:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
