"""A script's command line: a dataclass in, one line and exit code 2 if something is wrong with it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

import envs
from common import UserError, ranks


def parse(config: type) -> Any:
    """`config` from the command line, by tyro. Raises UserError with what tyro has to say."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(config, description=sys.modules["__main__"].__doc__)
    except SystemExit as e:
        if not e.code:  # --help
            raise
        text = re.sub(r"\x1b\[[0-9;]*m", "", errors.getvalue())  # colours
        text = re.sub(r"[^\x20-\x7e]+|-{4,}", " ", text)  # the box around it
        raise UserError(" ".join(text.split()) or "wrong arguments") from None


def cli(config: type, main: Callable[[Any], Any], several: bool = False) -> None:
    """Parse `config` and run `main` with it. several: `main` may be one of several processes, started by torchrun."""
    name = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):  # a console that cannot show a letter shows another in its place
        stream.reconfigure(errors="replace")
    try:
        cfg = parse(config)
        with ranks.process_group(several):
            main(cfg)
    except (UserError, envs.CannotRender) as e:
        if ranks.started_by_torchrun() and os.environ["LOCAL_RANK"] != "0":
            time.sleep(2)  # the first process has the same to say; torchrun ends all as soon as one ends
        else:
            print(f"{name}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if ranks.sides == 1:
            raise
        # Python would wait for the other thread's work to end: of an evaluation that is minutes
        print(f"{name}: interrupted", file=sys.stderr)
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # to die of it: a shell's loop ends, too
