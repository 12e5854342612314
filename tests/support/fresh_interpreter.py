"""Programs that each run as if alone in a fresh interpreter: in forks of one that has imported little or nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FORKS = """
import json, os, sys, traceback
for before, programs in json.load(sys.stdin):
    exec(before, {})
    for name, text in programs.items():
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            if status:
                sys.exit(f"{name}: " + open(os.path.join(sys.argv[1], name)).read())
            continue
        failed = 0
        with open(os.path.join(sys.argv[1], name), "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                exec(text, {})
            except SystemExit:
                pass
            except BaseException:
                traceback.print_exc()
                failed = 1
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(failed)
"""
Stage = tuple[str, Mapping[str, str]]
"""What the interpreter runs itself, after the stages before, and the programs of the forks that follow, by name."""


def last_lines(stages: Sequence[Stage], folder: Path) -> dict[str, str]:
    """What each program printed last, by its name; a program may end with SystemExit. AssertionError where one fails."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(folder)],
        input=json.dumps(stages),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    names = [name for _, programs in stages for name in programs]
    return {name: (folder / name).read_text(encoding="utf-8").rstrip().rpartition("\n")[2] for name in names}
