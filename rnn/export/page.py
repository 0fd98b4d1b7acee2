"""A model as one HTML page that needs no server and no network: it writes text, and shows what the model does inside.

`page.html` is the page's frame, `page.css` its looks, `page.js` all of its arithmetic. Each array stands in a data
block of its own, in base64; the page's policy lets the browser run this script and no other, and fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources

import numpy as np

from char_gru.rnn.checkpoint import Checkpoint
from char_gru.rnn.config import UserError
from char_gru.rnn.params import parameter_count

LARGEST_INT8 = 127


def page_bytes(checkpoint: Checkpoint, weights: str) -> bytes:
    """The bytes of the page's file, in UTF-8.

    weights: how the page holds the matrices. `fp32` leaves them as they are; `fp16` rounds each value to float16;
    `int8` rounds each value to a multiple, from -127 to 127, of its row's scale, which is the row's largest absolute
    value divided by 127. Biases stay in float32. The page computes with the float32 that these values stand for.

    Raises: UserError for `fp16` and a matrix with a value beyond the range of float16.
    """
    frame, style, script = (resources.files(__package__).joinpath(f"page.{suffix}").read_text("utf-8")
                            for suffix in ("html", "css", "js"))
    policy = (f"default-src 'none'; script-src '{_source_hash(script)}'; style-src '{_source_hash(style)}'; "
              "base-uri 'none'; form-action 'none'")
    blocks = "\n".join(
        f'<script type="application/octet-stream" id="{name}">{base64.b64encode(array).decode()}</script>'
        for name, array in _arrays(checkpoint.params, weights))
    model = {
        "sizes": asdict(checkpoint.sizes), "parameters": parameter_count(checkpoint.sizes), "weights": weights,
        "vocabulary": list(checkpoint.vocabulary.characters), "beginning": checkpoint.vocabulary.beginning,
        "megabytes": f"{(len(blocks) + len(frame) + len(style) + len(script)) / 1e6:.3g}",
    }
    # In JSON, "<" stands inside strings only; escaped, it can begin no tag and no comment of HTML.
    parts = {"policy": policy, "style": style, "script": script, "arrays": blocks,
             "model": json.dumps(model).replace("<", "\\u003c")}
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], frame).encode()


def _arrays(params: dict[str, np.ndarray], weights: str) -> Iterator[tuple[str, np.ndarray]]:
    """Name and content of each data block, little-endian; with `int8`, the scales of `X` are the block `X.scale`."""
    for name, array in params.items():
        if name.startswith("b") or weights == "fp32":
            yield name, np.ascontiguousarray(array, "<f4")
        elif weights == "fp16":
            if np.abs(array).max() > np.finfo(np.float16).max:
                raise UserError(f"{name} has values beyond 65,504, the largest of fp16; give --weights fp32")
            yield name, np.ascontiguousarray(array, "<f2")
        else:
            scale = (np.abs(array).max(axis=1) / LARGEST_INT8).astype("<f4")
            rows = array / np.where(scale > 0, scale, 1)[:, None]
            yield name, np.rint(rows).clip(-LARGEST_INT8, LARGEST_INT8).astype(np.int8)
            yield f"{name}.scale", scale


def _source_hash(source: str) -> str:
    """How a Content-Security-Policy names a script or a style that it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
