"""Draws the persistent recurrence as a plan cuts it, blocks by time: `python -m char_gru.kernels.drawing` writes
`kernels/persistent.svg`, for the forward pass of the tutorial's model on an H100.
"""

from pathlib import Path

from char_gru.kernels.plan.gpus import GPUS
from char_gru.kernels.plan.recurrence import PACKET_BYTES, RecurrencePlan, forward_plan

DRAWING = Path(__file__).with_name("persistent.svg")

_WIDTH, _HEIGHT = 1080, 532
_ROW_HEIGHT, _TOP = 74, 112
_ON_CHIP, _TIME = 40, 262  # x where the blocks and their weights are drawn, and where time begins
_LOAD, _STEP, _STEPS = 78, 236, 3  # widths of loading the weights and of a step; the number of steps
_PHASES = (("gather h", 54, "#9ecae1"), ("product", 58, "#fdae6b"), ("reduce", 42, "#fdd0a2"), ("cell", 32, "#a1d99b"))
_WAIT = _STEP - sum(width for _, width, _ in _PHASES)


class _Picture:
    """SVG shapes and texts, in the order in which they are painted."""

    def __init__(self) -> None:
        self._shapes: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, words: str = "") -> None:
        self._shapes.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="#555" '
                            'stroke-width="0.8" rx="2"/>')
        if words:
            self.words(x + width / 2, y + height / 2 + 4, words, anchor="middle")

    def words(self, x: float, y: float, words: str, anchor: str = "start", size: int = 11,
              weight: str = "normal") -> None:
        self._shapes.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}">'
                            f'{words}</text>')

    def line(self, x_1: float, y_1: float, x_2: float, y_2: float, style: str = "") -> None:
        self._shapes.append(f'<path d="M {x_1} {y_1} L {x_2} {y_2}" fill="none" stroke="#333" {style}/>')

    def svg(self) -> str:
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
                f'height="{_HEIGHT}" font-family="Helvetica, Arial, sans-serif">')
        arrow = ('<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                 'orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="#333"/></marker></defs>')
        background = f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
        return "\n".join([head, arrow, background, *self._shapes, "</svg>", ""])


def drawing(plan: RecurrencePlan) -> str:
    """The SVG of a persistent forward plan with one tile of rows for each group."""
    picture = _Picture()
    picture.words(_ON_CHIP, 28, f"The persistent recurrence: one launch for all steps, W_hh on chip (forward, "
                  f"H {plan.H:,}, B {plan.B}, {plan.precision}, an H100)", size=16, weight="bold")
    picture.words(_ON_CHIP, 52, f"{plan.groups} groups of {plan.blocks} blocks, one block on each multiprocessor. A "
                  f"group owns {plan.rows} rows of the batch, a block {plan.units} hidden units in these rows; their "
                  "r, z and n need no other block.", size=12)
    picture.words(_ON_CHIP, 70, "All that a step exchanges is h, through L2. Groups never wait for each other.",
                  size=12)
    picture.words(_ON_CHIP, 100, "on chip, for the whole launch", weight="bold")
    picture.words(_TIME, 100, "time", weight="bold")
    picture.line(_TIME + 30, 96, _WIDTH - 40, 96, 'stroke-width="1" marker-end="url(#arrow)"')
    bottom = _TOP + 3 * _ROW_HEIGHT + 24
    for row, block in enumerate((0, 1, plan.blocks - 1)):
        _block(picture, plan, block, _TOP + row * _ROW_HEIGHT + (20 if row == 2 else 0))
    picture.words(_ON_CHIP + 90, _TOP + 2 * _ROW_HEIGHT + 12, "⋮", size=16)
    _exchange(picture, plan, bottom)
    picture.words(_ON_CHIP, _HEIGHT - 44, f"Groups 1 to {plan.groups - 1} do the same with their own rows of the "
                  "batch, their own blocks and exchange.", size=12)
    picture.words(_ON_CHIP, _HEIGHT - 24, f"Predicted: {plan.predicted_us:.1f} us a step. Launched step by step "
                  f"(gru.cu), every step would read the {12 * plan.H**2 / 1e6:.1f} MB of W_hh again, and wait for a "
                  "launch.", size=12)
    return picture.svg()


def _block(picture: _Picture, plan: RecurrencePlan, block: int, y: float) -> None:
    units = plan.units_of(block)
    in_registers = plan.weights_bytes(plan.register_steps) >> 10
    in_shared = plan.weights_bytes(plan.k_steps - plan.register_steps) >> 10
    picture.box(_ON_CHIP, y, 196, 54, "#eeeeee")
    picture.words(_ON_CHIP + 8, y + 15, f"block {block}: units {units.start:,} to {units.stop - 1:,}", weight="bold")
    picture.box(_ON_CHIP + 8, y + 22, 118, 26, "#fd8d3c", f"W_hh {in_shared} KiB shared")
    if in_registers:
        picture.box(_ON_CHIP + 130, y + 22, 58, 26, "#fdae6b", f"{in_registers} in reg.")
    picture.box(_TIME, y + 10, _LOAD, 34, "#fd8d3c", "load W_hh")
    for step in range(_STEPS):
        x = _TIME + _LOAD + step * _STEP
        for name, width, colour in _PHASES:
            if x + width > _WIDTH - 20:
                return
            picture.box(x, y + 10, width, 34, colour, name)
            x += width
        picture.box(x, y + 10, _WAIT, 34, "#d9d9d9")
        picture.words(x + 3, y + 24, "save gates, h;", size=7)
        picture.words(x + 3, y + 36, "load P", size=7)


def _exchange(picture: _Picture, plan: RecurrencePlan, y: float) -> None:
    """The two halves of the exchange in L2, which take turns, and the bytes that a block writes and reads there."""
    top = y + 58
    for step in range(_STEPS):
        x = _TIME + _LOAD + step * _STEP
        published = x + _STEP - _WAIT
        if step < _STEPS - 1:
            picture.box(published - 66, top, _WAIT + 118, 32, "#c6dbef",
                        f"h_{step + 1} in half {(step + 1) % 2} of the exchange")
            picture.line(published - 16, y - 8, published - 16, top - 2, 'stroke-width="1.4" marker-end="url(#arrow)"')
            picture.line(published + _WAIT + 26, top, published + _WAIT + 26, y - 6,
                         'stroke-width="1.4" marker-end="url(#arrow)"')
            picture.line(published + _WAIT, _TOP - 4, published + _WAIT, top,
                         'stroke-width="1.2" stroke-dasharray="5 4"')
            picture.words(published + _WAIT + 4, top + 46, f"each warp waits for its packets with tag {step + 2}",
                          "middle", 10)
    packet_bytes, of_block = PACKET_BYTES[plan.precision], plan.packets // plan.blocks
    x = _TIME + _LOAD + _STEP - _WAIT
    picture.words(x - 22, y + 18, f"each block publishes {plan.rows * of_block * packet_bytes / 1024:g} KiB", "end")
    picture.words(x - 22, y + 33, f"(h of its units, {plan.values} and a tag to a packet)", "end")
    picture.words(x + _WAIT + 34, y + 18, f"and gathers {plan.rows * plan.packets * packet_bytes / 1024:g} KiB")
    picture.words(x + _WAIT + 34, y + 33, "(all units of its rows)")
    picture.words(_ON_CHIP, top + 14, "L2 cache", weight="bold")
    picture.words(_ON_CHIP, top + 28, "two halves of the exchange take turns")


def main() -> None:
    """Write the drawing."""
    DRAWING.write_text(drawing(forward_plan(GPUS["h100"], 64, 1024, "bf16")))


if __name__ == "__main__":
    main()
