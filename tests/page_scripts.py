"""The scripts of pages, run by node where there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

NODE = shutil.which("node")
runs = pytest.mark.skipif(NODE is None, reason="needs node, which runs the page's script")


def node(source: str, given: Any) -> Any:
    """What a script prints as JSON, having read `given` from its input."""
    assert NODE
    answer = subprocess.run(
        [NODE, "-e", source], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert not answer.returncode, answer.stderr
    return json.loads(answer.stdout)
