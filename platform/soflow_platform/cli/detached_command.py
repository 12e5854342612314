"""What the job of a submitted sweep runs: a command of soflowctl, with its output and its end in the sweep's folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from soflow_pipelines.storage.files import write_json
from soflow_platform.jobs.detached import EXIT, OUTPUT, Ended


def main(arguments: Sequence[str]) -> None:
    """Run a command of soflowctl with its output in the sweep's folder, and write how it ended."""
    folder, *command = arguments
    place = Path(folder)
    # A job begins in a folder of Ray's that may be gone; the places in its command do not depend on one.
    os.chdir(place)
    output = os.open(place / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    code = 1
    try:
        from soflow_platform.cli import main as program

        sys.argv = ["soflowctl", *command]
        program.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        write_json(place / EXIT, vars(Ended(code, time.time())))


if __name__ == "__main__":
    main(sys.argv[1:])
