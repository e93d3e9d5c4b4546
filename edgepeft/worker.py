"""One of the processes that train together on several devices; ``launch`` starts it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

# What takes long to import is imported where Ctrl-C is answered.


def main() -> None:
    """Do what the parent says, and tell it what there is to say, or what went wrong."""
    parent = Connection(int(sys.argv[1]))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # it was blocked until here
        _work(parent)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except EOFError:  # the parent is gone
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what is left of the others' connections may never be closed in order


def _work(parent: Connection) -> None:
    import traceback

    from edgepeft import launch, pipeline
    from edgepeft.errors import EdgePeftError
    from edgepeft.ranks import joined
    from edgepeft.surface import FSDP

    part: launch.Part = parent.recv()
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    count = part.recipe.devices
    try:
        with joined(part.rank, count, part.kind, part.meeting, sharded=part.recipe.strategy == FSDP) as ranks:
            pipeline.fit(part.recipe, part.out, ranks, parent.send)
    except EdgePeftError as error:
        parent.send(error)
    except Exception:
        parent.send(launch.failed(part.rank, count, traceback.format_exc().rstrip()))


def _end_with(parent: Connection) -> None:
    """End at once when the parent does, however that was killed."""
    try:
        parent.recv()
    except (EOFError, ConnectionError):
        os._exit(1)


if __name__ == "__main__":
    main()
