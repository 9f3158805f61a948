"""Commands for descriptors that come along with a message (SCM_RIGHTS), until something uses them."""

from __future__ import annotations

import os
from typing import Annotated, Final

from msgspec import Meta

from kvmpy.errors import CommandError
from kvmpy.monitor.table import Arguments, Caller, NoArguments, Nothing, Reply, command

LONGEST_NAME: Final = 256
Number = Annotated[int, Meta(le=2**63 - 1)]


class FdName(Arguments, frozen=True, kw_only=True):
    """What the descriptor is called."""

    fdname: Annotated[str, Meta(max_length=LONGEST_NAME)]  # its name, which does not begin with a digit


class AddFd(Arguments, frozen=True, kw_only=True, rename="kebab"):
    """Which set, and what for."""

    fdset_id: Number | None = None  # the set's number; default: one that is free
    opaque: Annotated[str, Meta(max_length=LONGEST_NAME)] | None = None  # any text, for query-fdsets to repeat


class AddFdInfo(Reply, frozen=True, kw_only=True, rename="kebab"):
    """Where the descriptor is now."""

    fdset_id: int  # the set's number
    fd: int  # its own, in kvmpy's process


class RemoveFd(Arguments, frozen=True, kw_only=True, rename="kebab"):
    """Which of them."""

    fdset_id: Number  # the set's number
    fd: Number | None = None  # the descriptor's; default: all of the set


class FdsetFdInfo(Reply, frozen=True, kw_only=True):
    """A descriptor of a set."""

    fd: int  # its number in kvmpy's process
    opaque: str | None = None  # what add-fd said of it


class FdsetInfo(Reply, frozen=True, kw_only=True, rename="kebab"):
    """A set of descriptors."""

    fdset_id: int  # the set's number
    fds: list[FdsetFdInfo]  # what is in it


@command("getfd", FdName, Nothing)
def getfd(caller: Caller, arguments: FdName) -> Nothing:
    """Keep the descriptor that came with this command under a name, until it is used or the session ends.

    One that had the name is closed.
    """
    fd = _received(caller)
    if arguments.fdname[:1].isdigit():
        os.close(fd)
        raise CommandError("Parameter 'fdname' expects a name not starting with a digit")
    try:
        caller.descriptors.add(arguments.fdname, fd)
    except ValueError as e:
        raise CommandError(str(e)) from e
    return Nothing()


@command("closefd", FdName, Nothing)
def closefd(caller: Caller, arguments: FdName) -> Nothing:
    """Close a descriptor that `getfd` has kept."""
    try:
        os.close(caller.descriptors.take(arguments.fdname))
    except KeyError as e:
        raise CommandError(f"File descriptor named '{arguments.fdname}' not found") from e
    return Nothing()


@command("add-fd", AddFd, AddFdInfo)
def add_fd(caller: Caller, arguments: AddFd) -> AddFdInfo:
    """Keep the descriptor that came with this command in a set, until it is removed or the last session ends."""
    fd = _received(caller)
    if (arguments.fdset_id or 0) < 0:
        os.close(fd)
        raise CommandError("Parameter 'fdset-id' expects a non-negative value")
    try:
        number = caller.descriptor_sets.add(fd, arguments.fdset_id, arguments.opaque)
    except ValueError as e:
        raise CommandError(str(e)) from e
    return AddFdInfo(fdset_id=number, fd=fd)


@command("remove-fd", RemoveFd, Nothing)
def remove_fd(caller: Caller, arguments: RemoveFd) -> Nothing:
    """Close a descriptor of a set, or all of them; a set without any is gone."""
    try:
        caller.descriptor_sets.remove(arguments.fdset_id, arguments.fd)
    except KeyError as e:
        name = f"fdset-id:{arguments.fdset_id}" + (f", fd:{arguments.fd}" if arguments.fd is not None else "")
        raise CommandError(f"File descriptor named '{name}' not found") from e
    return Nothing()


@command("query-fdsets", NoArguments, list[FdsetInfo])
def query_fdsets(caller: Caller, _: NoArguments) -> list[FdsetInfo]:
    """List the sets of descriptors."""
    return [
        FdsetInfo(fdset_id=number, fds=[FdsetFdInfo(fd=fd, opaque=opaque) for fd, opaque in members.items()])
        for number, members in caller.descriptor_sets
    ]


def _received(caller: Caller) -> int:
    fd = caller.take_descriptor()
    if fd is None:
        raise CommandError("No file descriptor supplied via SCM_RIGHTS")
    return fd
