"""The command line: arguments, and what an error means to the shell (docs/exit-codes.md).

Exit codes: 0 the guest powered off, or the command did what was asked; 1 the host failed; 2 the configuration, or the
command line, is wrong; 3 the guest panicked. Each command's module is imported when it is run: start-up is a feature.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Final

from kvmpy import __version__
from kvmpy.errors import ADVICE, ConfigError, HostProblems, KvmpyError, VcpuError, errno_name

HOST_ERROR: Final = 1
CONFIG_ERROR: Final = 2
LONGEST_DOWNTIME: Final = 2_000_000  # QEMU's MAX_MIGRATE_DOWNTIME
LONGEST_LIMIT: Final = 86400.0  # a guest that takes more than a day to power off never will


def main(argv: Sequence[str]) -> int:
    """Run the command in ``argv``; returns the exit code."""
    args, surplus = make_parser(argv[0] if argv else "").parse_known_args(argv)
    if surplus:
        args.parser.error(f"unrecognized arguments: {' '.join(surplus)}")
    try:
        result = _imported(args.run)(args)
    except BrokenPipeError:  # whoever read our output has had enough
        return HOST_ERROR
    except (KvmpyError, OSError) as e:
        if args.debug:
            import traceback

            tell(traceback.format_exc().rstrip())
        return say(e)
    return result


def _imported(run: str) -> Callable[[argparse.Namespace], int]:
    """The function "module:function" of a command. What is imported for it stays: no garbage is looked for in it."""
    module, function = run.split(":")
    gc.disable()
    try:
        command: Callable[[argparse.Namespace], int] = getattr(import_module(f"kvmpy.cli.{module}"), function)
    finally:
        gc.freeze()
        gc.enable()
    return command


def say(e: KvmpyError | OSError) -> int:
    """Tell the operator what went wrong, each mistake on a line; returns the exit code."""
    for problem in e.problems if isinstance(e, ConfigError | HostProblems) else (_sentence(e),):
        tell(f"kvmpy: {printable(problem)}")
    if isinstance(e, VcpuError) and e.registers:
        tell(e.registers)
    return CONFIG_ERROR if isinstance(e, ConfigError) else HOST_ERROR


def tell(text: str) -> None:
    """Put ``text`` on standard error, whatever has become of that."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")  # in one piece, for several threads trace


def printable(text: str) -> str:
    """``text`` on one line, without what a terminal would obey."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _sentence(e: KvmpyError | OSError) -> str:
    number = e.errno or 0 if isinstance(e, OSError) else 0
    if isinstance(e, KvmpyError):
        text = str(e)
    else:
        text = ": ".join(str(part) for part in (e.filename, errno_name(number), e.strerror) if part is not None)
    return f"{text}; {ADVICE[number]}" if number in ADVICE else text


class _Help(argparse.HelpFormatter):
    """As wide as the terminal. Argparse makes one for every option, and would import all that shutil does for that."""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
        except (ValueError, OSError):
            columns = 0
        super().__init__(prog, width=(columns if columns > 0 else 80) - 2)


def make_parser(command: str = "") -> argparse.ArgumentParser:
    """Every command and option; of ``run`` its own only, because to make the others takes longer than to use them."""
    parser = argparse.ArgumentParser(
        prog="kvmpy", description="Boot and control Linux guests on KVM.", formatter_class=_Help
    )
    parser.add_argument("--version", action="version", version=f"kvmpy {__version__}")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = _command(commands, "run", "run:run", "run a machine in the foreground, its serial line on this terminal")
    _config_arguments(run)
    run.add_argument(
        "--powerdown-limit",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="after SIGTERM or SIGINT has pressed the power button, stop the guest in this time (default 30)",
    )
    run.add_argument("--detach", action="store_true", help="in the background, its serial line on a pty, once it runs")
    run.add_argument(
        "--log",
        metavar="FILE",
        help="with --detach: where its messages go (default /var/log/kvmpy/NAME.log, or below ~/.local/state)",
    )
    run.add_argument(
        "--incoming",
        metavar="URI",
        help="do not boot: wait there for a machine that is migrated to here (tcp:HOST:PORT, unix:PATH, fd:NUMBER, "
        "exec:COMMAND, file:PATH), or until migrate-incoming says where (defer)",
    )
    run.add_argument("--insecure", action="store_true", help="with --incoming: let tcp be used without TLS")
    run.add_argument("--timings", action="store_true", help="say at the end where the time of the first boot went")
    run.add_argument("--trace", action="append", default=[], metavar="GLOB", help="trace to stderr, such as 'bus.*'")

    if command == "run":
        return parser

    check = _command(commands, "check", "check:check", "check a configuration; needs neither root nor /dev/kvm")
    _config_arguments(check)

    doctor = _command(commands, "doctor", "doctor:doctor", "check what this host can do, and say how to mend it")
    doctor.add_argument("--json", action="store_true", help="for scripts")
    doctor.add_argument("--device", metavar="ADDRESS", help="whether that PCI function can be passed through")

    baseline = _command(
        commands,
        "cpu-baseline",
        "cpu_baseline:cpu_baseline_command",
        "describe the processor that this host can give a guest, or the one that several hosts can",
    )
    baseline.add_argument("--output", metavar="FILE", help="instead of standard output")
    baseline.add_argument(
        "host",
        nargs="*",
        metavar="HOST.json",
        help="what the command printed on a host; without one, describe this host",
    )

    ps = _command(commands, "ps", "control:ps", "list the machines that run")
    ps.add_argument("--json", action="store_true", help="for scripts")

    status = _command(commands, "status", "control:status", "say what a machine is doing")
    status.add_argument("--json", action="store_true", help="for scripts")
    status.add_argument("name", help="the machine")

    for name, text in (
        ("pause", "stop a machine's vCPUs"),
        ("reset", "press the reset button"),
        ("stop", "pull the plug"),
    ):
        _command(commands, name, f"control:{name}", text).add_argument("name", help="the machine")

    resume = _command(commands, "resume", "control:resume", "let a paused machine run on")
    resume.add_argument("name", help="the machine")
    resume.add_argument(
        "--force", action="store_true", help="though the guest went elsewhere: it must not run there, or both do"
    )

    powerdown = _command(commands, "powerdown", "control:powerdown", "press the power button")
    powerdown.add_argument("name", help="the machine")
    powerdown.add_argument(
        "--limit",
        type=seconds,
        metavar="SECONDS",
        help="have the machine pull the plug if it takes longer; does not wait",
    )

    migrate = _command(commands, "migrate", "migrate:migrate", "move a running machine to another host")
    migrate.add_argument("name", help="the machine")
    migrate.add_argument(
        "uri", nargs="?", help="where to: tcp:HOST:PORT, unix:PATH, ssh://[USER@]HOST[:PORT], exec:COMMAND or file:PATH"
    )
    migrate.add_argument("--dry-run", action="store_true", help="list all that stands in the way here and there")
    migrate.add_argument("--cancel", action="store_true", help="cancel the migration that is under way")
    _migration_arguments(migrate)
    _ssh_arguments(migrate)

    save = _command(commands, "save", "migrate:save", "put a running machine into a file, and end it")
    save.add_argument("name", help="the machine")
    save.add_argument("file", help="a new file; kvmpy run CONFIG --incoming file:FILE takes the machine out of it")
    _migration_arguments(save)

    _command(commands, "receive", "receive:receive", "the far end of kvmpy migrate NAME ssh://HOST, which starts it")

    console = _command(commands, "console", "console:console", "attach to a machine's serial line (Ctrl-A x leaves)")
    console.add_argument("name", help="the machine")

    trace = _command(commands, "trace", "trace:trace", "print what a running machine does, until Ctrl-C")
    trace.add_argument("name", help="the machine")
    trace.add_argument("glob", help="which tracepoints, such as 'virtio.*' or 'bus.*'")

    qmp = _command(commands, "qmp", "qmp:qmp", "send a monitor command and print the reply")
    qmp.add_argument("name", help="the machine")
    qmp.add_argument("command", nargs="?", help="such as query-status; without one, list what there is")
    qmp.add_argument(
        "arguments", nargs="*", metavar="KEY=VALUE", help="VALUE is JSON, or else a string; a.b=1 is {a: {b: 1}}"
    )
    qmp.add_argument("--events", action="store_true", help="print the machine's events, one a line, until it ends")
    return parser


def _migration_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--report", action="append", default=[], metavar="FILE", help="write a timeline: .html, .svg or .json")
    add("--keep", action="store_true", help="leave the source's process, paused, where the guest has left it")
    add("--plain", action="store_true", help="lines instead of a progress bar")
    add("--max-bandwidth", type=size, metavar="SIZE", help="send at most so much a second, such as 100MiB")
    add("--downtime-limit", type=milliseconds, metavar="MS", help="how long the guest may stand still (default 300)")
    add("--channels", type=int, metavar="N", help="connections for memory beside the main one")
    add("--compression", choices=("none", "zstd"), help="of memory on its way (default none)")
    add("--tls-creds", metavar="DIR", help="the directory of the certificates, here")
    add("--tls-hostname", metavar="NAME", help="what the destination's certificate is for, where that is not HOST")
    add("--insecure", action="store_true", help="tcp: without TLS")
    add("--timeout", type=seconds, metavar="SECONDS", help="how long the other side may be silent (default 10)")
    add(
        "--on-no-convergence",
        choices=("throttle", "cancel", "continue"),
        help="what to do where the guest writes faster than its memory can be sent (default throttle)",
    )
    pair = parser.add_argument_group("with failover pairs")
    pair.add_argument(
        "--unplug-timeout",
        type=seconds,
        metavar="SECONDS",
        help="how long the guest may take to let its primary go (default 30)",
    )
    pair.add_argument(
        "--on-unplug-timeout", choices=("fail", "surprise"), help="and then: fail (default), or tear the primary out"
    )
    pair.add_argument(
        "--primaries",
        choices=("require", "best-effort"),
        help="whether there must be a primary for it at the destination (default require)",
    )
    pair.add_argument(
        "--prepare-timeout",
        type=seconds,
        metavar="SECONDS",
        help="how much longer the guest may have to run here for the destination to prepare its primaries (default 60)",
    )
    pair.add_argument("--release-primaries", action="store_true", help="free them here once the guest runs there")


def _ssh_arguments(parser: argparse.ArgumentParser) -> None:
    ssh = parser.add_argument_group("with ssh://")
    ssh.add_argument(
        "--remote-config", metavar="FILE", help="a configuration there, instead of a copy of this machine's"
    )
    ssh.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of it there; may be repeated"
    )
    ssh.add_argument("--remote-kvmpy", default="kvmpy", metavar="COMMAND", help="kvmpy there (default: kvmpy)")
    ssh.add_argument("--ssh", default="ssh", metavar="COMMAND", help="ssh here, with options (default: ssh)")


def size(text: str) -> int:
    """A size with a unit, for argparse."""
    from kvmpy.config.values import Size

    try:
        return Size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def milliseconds(text: str) -> int:
    """A time the guest may stand still, for argparse."""
    if not text.isdecimal() or int(text) > LONGEST_DOWNTIME:
        raise argparse.ArgumentTypeError(f"expected milliseconds, 0 to {LONGEST_DOWNTIME}, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time to wait, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= LONGEST_LIMIT:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 to {LONGEST_LIMIT:g}, got {text!r}")
    return value


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=_Help)
    # Said after the command it counts too; left out there, it leaves alone what was said before it.
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show a traceback with an error"
    )
    parser.set_defaults(run=run, parser=parser)  # whose usage a surplus argument is answered with
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the machine's TOML file")
    parser.add_argument("--name", help="instead of the configuration's name")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, such as machine.memory=1GiB; may be repeated",
    )
