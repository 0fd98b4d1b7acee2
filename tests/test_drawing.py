"""The drawing of the persistent recurrence is the one that its plan gives."""

import xml.etree.ElementTree as ET

from char_gru.kernels import drawing
from char_gru.kernels.plan.gpus import GPUS
from char_gru.kernels.plan.recurrence import forward_plan


def test_committed_drawing_is_that_of_todays_plan():
    plan = forward_plan(GPUS["h100"], 64, 1024, "bf16")
    assert drawing.DRAWING.read_text() == drawing.drawing(plan)


def test_drawing_is_svg_that_names_the_units_of_its_blocks():
    plan = forward_plan(GPUS["h100"], 64, 1024, "tf32")
    words = [element.text for element in ET.fromstring(drawing.drawing(plan)).iter() if element.text]
    last = plan.units_of(plan.blocks - 1)
    assert f"block {plan.blocks - 1}: units {last.start:,} to {last.stop - 1:,}" in words
