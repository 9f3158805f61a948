"""Print a migration stream: scripts/stream-dump FILE, or what comes on its standard input.

The exit code is 0 for a stream that is whole, 1 for one that breaks, and 2 where there is none to be read.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing

from kvmpy.errors import MigrationError
from kvmpy.migration.channel import FileChannel
from kvmpy.migration.dump import WIDTH, lines
from kvmpy.migration.stop import Stop

A_DAY = 86400.0  # that a pipe may take


def main() -> int:
    parser = argparse.ArgumentParser(prog="stream-dump", description="Print what is in a migration stream.")
    parser.add_argument("file", nargs="?", default="-", help="a saved stream; default: - is standard input")
    parser.add_argument("--offset", type=int, default=0, help="where in the file it begins, as in file:PATH,offset=N")
    parser.add_argument("--full", action="store_true", help="print all of every value, however long")
    arguments = parser.parse_args()
    try:
        fd = os.dup(0) if arguments.file == "-" else os.open(arguments.file, os.O_RDONLY)
        if arguments.offset:
            os.lseek(fd, arguments.offset, os.SEEK_SET)
    except OSError as e:
        print(f"stream-dump: {arguments.file}: {e.strerror}", file=sys.stderr)
        return 2
    name = "standard input" if arguments.file == "-" else arguments.file
    blocking = os.get_blocking(fd)
    try:
        with Stop() as stop, closing(FileChannel(name, stop, fd)) as channel:
            channel.timeout = A_DAY
            for line in lines(channel, width=None if arguments.full else WIDTH):
                print(line)
    except MigrationError as e:
        sys.stdout.flush()
        print(f"stream-dump: the stream breaks: {e}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    finally:
        if arguments.file == "-":  # the terminal's, or another process's too
            os.set_blocking(0, blocking)
    return 0


if __name__ == "__main__":
    sys.exit(main())
