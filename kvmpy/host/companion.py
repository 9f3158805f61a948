"""Starting a process of ours beside the VMM, one that does for it what cannot be done beside running vCPUs.

It has a socket to us as descriptor CONTROL, and lives as long as our end of that, however we end. It is no child of the
terminal: Ctrl-C and a signal to our group pass it by.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Final

CONTROL: Final = 3
# Nobody but us ends it, lest it leave something half done; systemd, say, signals a service's every process.
BLOCKED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def spawn(module: str, control: int, *arguments: str) -> int:
    """Run ``module`` with ``control`` as its socket, in a session of its own; returns its process id. Raises OSError.

    posix_spawn has nothing to import, and nothing to copy of a guest's RAM.
    """
    # Whichever way kvmpy was found here, by a path, an editable install or the working directory, it is found there.
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    return os.posix_spawn(
        sys.executable,
        (sys.executable, "-P", "-m", module, *arguments),
        {**os.environ, "PYTHONPATH": path},
        file_actions=(
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, control, CONTROL),
        ),
        setsid=True,
        setsigmask=BLOCKED,
        setsigdef=(signal.SIGCHLD,),  # a program that uses us may ignore it, and a companion waits for what it starts
    )
