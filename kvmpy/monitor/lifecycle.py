"""Commands that stop the machine, let it go on, reset it and end it."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from kvmpy.monitor.table import Arguments, Caller, NoArguments, Nothing, command


class Powerdown(Arguments, frozen=True, kw_only=True):
    """When to give up on the guest."""

    limit: Annotated[float, Meta(ge=0)] | None = None  # seconds until the plug is pulled (ours); default: never


class Cont(Arguments, frozen=True, kw_only=True):
    """Whether it is known that the guest does not run elsewhere."""

    force: bool = False  # go on although the guest was handed over, or may have been: it must not run there (ours)


@command("stop", NoArguments, Nothing, slow=True)
def stop(caller: Caller, _: NoArguments) -> Nothing:
    """Stop the vCPUs, and with them the devices; `cont` lets them go on. Nothing happens if they stand still.

    What a disk has under way is waited for: if the host's disk does not answer, until it does, or until `quit`.
    """
    caller.machine.pause()
    return Nothing()


@command("cont", Cont, Nothing, slow=True)
def cont(caller: Caller, arguments: Cont) -> Nothing:
    """Let the vCPUs run on after `stop`. Nothing happens if they run.

    After a migration, or one whose outcome is unknown, only with `force`. Two hosts that run one guest destroy its
    disks: use it when the other side is known to be gone.
    """
    caller.machine.resume(force=arguments.force)
    return Nothing()


@command("system_reset", NoArguments, Nothing, slow=True)
def system_reset(caller: Caller, _: NoArguments) -> Nothing:
    """Press the reset button: the kernel is loaded anew, from its file as it is now.

    Disks are waited for as `stop` does, and devices that are passed through are reset too, which takes up to seconds.
    """
    caller.machine.reset()
    return Nothing()


@command("system_powerdown", Powerdown, Nothing)
def system_powerdown(caller: Caller, arguments: Powerdown) -> Nothing:
    """Press the power button. What the guest does about it is its choice: SHUTDOWN says that it has powered off."""
    caller.machine.powerdown(arguments.limit)
    return Nothing()


@command("quit", NoArguments, Nothing)
def quit_(caller: Caller, _: NoArguments) -> Nothing:
    """Pull the plug: the machine and its process end, within seconds even if a disk does not answer."""
    caller.machine.stop()
    return Nothing()
