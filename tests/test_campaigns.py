"""A few of the kills, simultaneous starts and altered checkpoints that the campaigns try by the hundred."""

import subprocess
import sys

import pytest

from tests.helpers.commands import DEADLINE, ROOT


@pytest.mark.parametrize(("campaign", "count"), [("kills", 5), ("starts", 6), ("checkpoints", 65)])
def test_campaign_finds_nothing(campaign, count):
    done = subprocess.run([sys.executable, "-m", f"tests.campaigns.{campaign}", str(count)], cwd=ROOT, check=False,
                          capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stdout + done.stderr
