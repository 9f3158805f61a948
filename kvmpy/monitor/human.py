"""human-monitor-command: a few lines of QEMU's human monitor, enough for `qmp-shell -H`.

A line is put in QMP's terms and the answer in words. What concerns devices is left to QMP, whose arguments have types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from kvmpy.errors import CommandError
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import RunState
from kvmpy.monitor.queries import version
from kvmpy.monitor.table import Arguments, Caller, command

EOL: Final = "\r\n"
SWITCH: Final = {"on": True, "off": False}


class HumanLine(Arguments, frozen=True, kw_only=True, rename="kebab"):
    """What somebody has typed."""

    command_line: Annotated[str, Meta(max_length=4096)]  # a line, such as "info status"
    cpu_index: int | None = None  # the vCPU that a line is about; none of ours is


class Line(msgspec.Struct, frozen=True):
    """What a line that begins with a certain word does: ``run`` is given the other words, one a parameter."""

    parameters: str
    text: str
    run: Callable[[Caller, list[str]], str]
    short: str = ""


@command("human-monitor-command", HumanLine, str)
def human_monitor_command(caller: Caller, arguments: HumanLine) -> str:
    """Do a line of QEMU's human monitor, and return what it says.

    There are a few: `help`, `info`, `stop`, `cont`, `system_reset`, `system_powerdown`, `set_link` and `quit`.
    Where a change has to wait for the host, as `stop` does for a disk, this does not.
    """
    index = arguments.cpu_index
    if index is not None and not 0 <= index < len(caller.machine.threads):
        raise CommandError("Parameter 'cpu-index' expects a CPU number")
    words = arguments.command_line.split()
    return _run(LINES, caller, words) if words else ""


def _run(lines: Mapping[str, Line], caller: Caller, words: list[str], within: str = "") -> str:
    name, *rest = words
    line = lines.get(name) or next((line for line in lines.values() if name == line.short), None)
    if line is None:
        return f"unknown command: '{within}{name}'{EOL}"
    if line.parameters[:1] != "[" and len(rest) != len(line.parameters.split()):
        expected = line.parameters or "nothing more"
        return f'{within}{name}: expected {expected}{EOL}Try "help {name}" for more information{EOL}'
    try:
        return line.run(caller, rest)
    except CommandError as e:
        return f"Error: {e}{EOL}"


def _help(caller: Caller, words: list[str]) -> str:
    if words == ["info"]:
        return _listed(INFO, "info ")
    return _listed({name: line for name, line in LINES.items() if words in ([], [name])})


def _info(caller: Caller, words: list[str]) -> str:
    return _run(INFO, caller, words, "info ") if words else _listed(INFO, "info ")


def _listed(lines: Mapping[str, Line], before: str = "") -> str:
    return "".join(
        f"{before}{name}{line.short and '|'}{line.short} {line.parameters} -- {line.text}{EOL}"
        for name, line in lines.items()
    )


def _status(caller: Caller, _: list[str]) -> str:
    state = caller.machine.state
    detail = f" ({state.value})" if state not in (RunState.RUNNING, RunState.PAUSED) else ""
    return f"VM status: {'running' if state is RunState.RUNNING else 'paused'}{detail}{EOL}"


def _cpus(caller: Caller, _: list[str]) -> str:
    threads = caller.machine.threads
    return "".join(f"  CPU #{thread.vcpu.index}: thread_id={thread.native_id}{EOL}" for thread in threads)


def _set_link(caller: Caller, words: list[str]) -> str:
    name, state = words
    if state not in SWITCH:
        raise CommandError("Parameter 'up' expects 'on' or 'off'")
    caller.machine.set_link(name, up=SWITCH[state])
    return ""


def _quietly(change: Callable[[Machine], object]) -> Callable[[Caller, list[str]], str]:
    """A line without parameters that has nothing to say."""

    def run(caller: Caller, _: list[str]) -> str:
        change(caller.machine)
        return ""

    return run


INFO: Final = {
    "cpus": Line("", "show the vCPUs and their threads", _cpus),
    "kvm": Line("", "show whether KVM is used", lambda caller, _: f"kvm support: enabled{EOL}"),
    "name": Line("", "show the machine's name", lambda caller, _: caller.machine.name + EOL),
    "status": Line("", "show whether the machine runs", _status),
    "version": Line("", "show the version of kvmpy", lambda caller, _: version().package + EOL),
}
LINES: Final = {
    "cont": Line("", "let the vCPUs run on", _quietly(lambda machine: machine.resume()), "c"),
    "help": Line("[command]", "list the commands, or show one", _help, "?"),
    "info": Line("[subcommand]", "show what the machine is and does", _info),
    "quit": Line("", "pull the plug", _quietly(lambda machine: machine.stop()), "q"),
    "set_link": Line("name on|off", "plug a network device's cable in, or pull it", _set_link),
    "stop": Line("", "stop the vCPUs", _quietly(lambda machine: machine.pause()), "s"),
    "system_powerdown": Line("", "press the power button", _quietly(lambda machine: machine.powerdown())),
    "system_reset": Line("", "press the reset button", _quietly(lambda machine: machine.reset())),
}
