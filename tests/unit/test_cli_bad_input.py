"""Bad input at the command line: what the operator reads, the exit code, and that nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kvmpy import __version__
from kvmpy._native import ffi
from kvmpy.abi import ioctl
from kvmpy.abi import kvm as abi
from kvmpy.cli.doctor import examine, report
from kvmpy.cli.finding import FAIL, Finding
from kvmpy.cli.main import main
from kvmpy.errors import IoctlError
from kvmpy.host.tree import Host
from kvmpy.kvm.system import REQUIRED, System, virtualization
from tests.fakes.pvh_kernel import POWER_OFF, pvh_kernel
from tests.unit.test_boot_bzimage import bzimage

GOOD: Final = '[boot]\nkernel = "kernel"\n[machine]\nmemory = "16MiB"\n'
ELF_CLASS: Final = 4  # e_ident[EI_CLASS]: 1 is 32-bit
NAME_FORM: Final = "expected a name (up to 64 letters, digits, '.', '_', '-'; not '.' or '-' first)"

Answer = tuple[int, str, str]
Kvmpy = Callable[..., Answer]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: m.toml with a good kernel, and an empty runtime directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "m.toml").write_text(GOOD)
    (tmp_path / "kernel").write_bytes(pvh_kernel(POWER_OFF))
    return tmp_path


def state(here: Path) -> dict[str, object]:
    """What a command could leave behind: in its runtime directory, in this process, and of its settings."""
    return {
        "runtime directory": os.listdir(here / "run"),
        "descriptors": {fd: target(fd) for fd in os.listdir("/proc/self/fd") if is_open(fd)},
        "threads": threading.enumerate(),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "handlers": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
    }


def target(fd: str) -> str:
    """What a descriptor is; a file without a name, such as pytest's own for output, may change its number."""
    return re.sub(r"#[0-9]+ \(deleted\)", "(deleted)", os.readlink(f"/proc/self/fd/{fd}"))


def is_open(fd: str) -> bool:
    """The descriptor that lists the others is closed by now."""
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.fixture
def kvmpy(here: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Kvmpy]:
    """``kvmpy("check", "m.toml")``: exit code, standard output, standard error; afterwards all is as it was."""

    def run(*argv: str) -> Answer:
        try:
            code = main(argv)
        except SystemExit as e:  # argparse
            code = int(str(e.code))
        return code, *capfd.readouterr()

    before = state(here)
    yield run
    assert state(here) == before


# Mistakes in the configuration: exit 2, from check and from run alike, each located


def refusals(row: str, text: str, *problems: str) -> Any:
    return pytest.param(text, problems, id=row)


CONFIG_MISTAKES: Final = (
    refusals(
        "unknown key",
        GOOD + 'memoryy = "1GiB"\n',
        "m.toml:5: machine.memoryy: unknown key 'memoryy' (did you mean 'memory'?)",
    ),
    refusals("unknown table", GOOD + "[machin]\n", "m.toml:5: machin: unknown key 'machin' (did you mean 'machine'?)"),
    refusals(
        "wrong type",
        GOOD + 'cpus = "two"\n',
        'm.toml:5: machine.cpus: expected an integer, got a string ("two")',
    ),
    refusals(
        "missing id",
        GOOD + '[[root_port]]\n[[drive]]\npath = "d"\nformat = "raw"\n',
        *(
            "m.toml:5: root_port[0].id: missing",
            "m.toml:6: drive[0].id: missing",
        ),
    ),
    refusals(
        "duplicate id",
        GOOD + '[[root_port]]\nid = "r"\n[[root_port]]\nid = "r"\n',
        "m.toml:8: root_port[1].id: duplicate id 'r': root_port[0].id has it",
    ),
    refusals(
        "dangling reference",
        GOOD
        + '[[drive]]\nid = "disk0"\npath = "d"\nformat = "raw"\n'
        + '[[device]]\ndriver = "virtio-blk-pci"\nid = "v"\ndrive = "disc0"\n',
        "m.toml:12: device[0].drive: no drive has the id \"disc0\" (did you mean 'disk0'?)",
    ),
    refusals(
        "all in one go",
        '[machine]\nmemory = 0\ncpuss = 1\n[boot]\nkernel = 1\n[[device]]\ndriver = "virtio-rng-pci"\nbus = "r"\n',
        "m.toml:2: machine.memory: expected 16 MiB to 4096 TiB, got 0 bytes",
        "m.toml:3: machine.cpuss: unknown key 'cpuss' (did you mean 'cpus'?)",
        "m.toml:5: boot.kernel: expected a path, got an integer (1)",
        "m.toml:6: device[0].id: missing",
        'm.toml:8: device[0].bus: no root_port has the id "r"',
    ),
    refusals(
        "no such baseline",
        GOOD + 'cpu = "fleet.json"\n',
        "m.toml:5: machine.cpu: {here}/fleet.json: ENOENT: cannot be read",
    ),
    refusals(
        "no baseline",
        GOOD + 'cpu = "m.toml"\n',
        "m.toml:5: machine.cpu: {here}/m.toml: is not JSON; make it with 'kvmpy cpu-baseline'",
    ),
    refusals("not TOML", GOOD + "memory\n", "m.toml:5: not TOML: expected '=' after a key in a key/value pair"),
    refusals(
        "memory of 0",
        GOOD.replace('"16MiB"', "0"),
        "m.toml:4: machine.memory: expected 16 MiB to 4096 TiB, got 0 bytes",
    ),
    refusals(
        "odd memory",
        GOOD.replace('"16MiB"', "16777217"),
        "m.toml:4: machine.memory: 16777217 bytes is not a multiple of the page size, 4 KiB",
    ),
    refusals(
        "memory of no unit",
        GOOD.replace("16MiB", "16MB"),
        "m.toml:4: machine.memory: unknown unit 'MB' in \"16MB\" (did you mean 'MiB'?)",
    ),
    refusals(
        "memory in a unit of lower case",
        GOOD.replace("16MiB", "16mib"),
        "m.toml:4: machine.memory: unknown unit 'mib' in \"16mib\" (did you mean 'MiB'?)",
    ),
    refusals(
        "a byte order mark",
        "\ufeff" + GOOD,
        "m.toml:1: starts with a byte order mark (BOM); save it without one",
    ),
    refusals(
        "more vCPUs than APIC ids",
        GOOD + "cpus = 255\n",
        ("m.toml:5: machine.cpus: expected an integer <= 254, got 255"),
    ),
    refusals(
        "more devices than the root bus has places",
        GOOD + "".join(f'[[root_port]]\nid = "r{n}"\n' for n in range(32)),
        "m.toml:5: root_port: 32 root ports and devices without a bus, where the root bus has 31 places; "
        "plug devices into root ports",
    ),
    refusals(
        "a setting of a later version",
        GOOD + "dirty_ring = true\n",
        "m.toml:5: machine.dirty_ring: this version of kvmpy logs dirty pages in the bitmap only; leave it out",
    ),
    refusals(
        "a hook that cannot be run",
        GOOD + 'failover_hook = "m.toml"\n',
        "m.toml:5: machine.failover_hook: {here}/m.toml: is no executable file; "
        "make it one (chmod +x), or leave it out",
    ),
    refusals(
        "command line too long",
        GOOD.replace("[machine]", f'cmdline = "{"x" * 3000}"\n[machine]'),
        ("m.toml:3: boot.cmdline: 3000 characters, and the kernel takes at most 2047"),
    ),
    refusals(
        "boot and devices in one go",
        '[boot]\nkernel = "absent"\ninitrd = "gone"\n[machine]\ndirty_ring = true\n',
        "m.toml:2: boot.kernel: {here}/absent: cannot be opened: No such file or directory (ENOENT)",
        "m.toml:3: boot.initrd: {here}/gone: cannot be opened: No such file or directory (ENOENT)",
        "m.toml:5: machine.dirty_ring: this version of kvmpy logs dirty pages in the bitmap only; leave it out",
    ),
)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["run", "m.toml", "--incoming", "foo:1"], "--incoming foo:1: expected tcp:HOST:PORT, unix:PATH, "),
        (["run", "m.toml", "--incoming", "tcp:host"], "--incoming tcp:host: expected tcp:HOST:PORT"),
        (["run", "m.toml", "--insecure"], "--insecure: only with --incoming"),
        (["migrate", "m", "foo:1"], "URI: foo:1: expected tcp:HOST:PORT, unix:PATH, "),
        (["migrate", "m"], "URI: where to? Such as ssh://HOST"),
        (["migrate", "m", "unix:/x", "--set", "machine.cpus=2"], "--set: only with ssh://"),
    ],
)
def test_migration_that_is_said_wrongly_is_the_command_lines_mistake(argv: list[str], said: str, kvmpy: Kvmpy) -> None:
    code, _, err = kvmpy(*argv)
    assert code == 2
    assert err.startswith(f"kvmpy: {said}")


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(("text", "problems"), CONFIG_MISTAKES)
def test_each_mistake_is_a_line_with_its_place_and_the_exit_code_is_2(
    kvmpy: Kvmpy, here: Path, command: str, text: str, problems: tuple[str, ...]
) -> None:
    (here / "m.toml").write_text(text)
    expected = "".join(f"kvmpy: {problem.format(here=here)}\n" for problem in problems)
    assert kvmpy(command, "m.toml") == (2, "", expected)


def test_a_host_description_that_cannot_be_used_is_the_hosts_fault(kvmpy: Kvmpy, here: Path) -> None:
    assert kvmpy("cpu-baseline", "a.json", "b.json") == (1, "", "kvmpy: a.json: ENOENT: cannot be read\n")
    (here / "a.json").write_text("{}")
    refusal = "a section has exactly the keys name, version and state; make it with 'kvmpy cpu-baseline'"
    assert kvmpy("cpu-baseline", "a.json") == (1, "", f"kvmpy: a.json: is no CPU baseline: cpu: {refusal}\n")


KERNELS: Final = {
    "missing": (None, "cannot be opened: No such file or directory (ENOENT)"),
    "empty": (b"", "is empty"),
    "not a kernel": (b"hello\n", "is neither a bzImage nor an ELF vmlinux but text"),
    "a packed one": (b"\x1f\x8b" * 9, "is neither a bzImage nor an ELF vmlinux but gzip data: unpack it"),
    "32-bit bzImage": (bzimage(xloadflags=0), "is a 32-bit kernel; kvmpy starts 64-bit kernels only"),
    "truncated bzImage": (bzimage()[:-1], "is cut off: 5631 bytes, and its header speaks of 5632"),
    "32-bit ELF": (b"\x7fELF\x01" + pvh_kernel(POWER_OFF)[5:], "32-bit"),
    "truncated ELF": (pvh_kernel(POWER_OFF)[:-1], "is cut off: 207 bytes, and a segment ends at 208"),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(("image", "reason"), KERNELS.values(), ids=KERNELS)
def test_a_kernel_that_cannot_be_started_is_named_with_the_reason(
    kvmpy: Kvmpy, here: Path, command: str, image: bytes | None, reason: str
) -> None:
    (here / "kernel").unlink()
    if image is not None:
        (here / "kernel").write_bytes(image)
    code, out, err = kvmpy(command, "m.toml")
    assert (code, out) == (2, "")
    assert err.startswith(f"kvmpy: m.toml:2: boot.kernel: {here}/kernel: ")
    assert reason in err
    assert err.count("\n") == 1


def test_an_initrd_larger_than_the_memory_is_refused_with_both_sizes(kvmpy: Kvmpy, here: Path) -> None:
    (here / "initrd").touch()
    os.truncate(here / "initrd", 20 << 20)
    code, _, err = kvmpy("check", "m.toml", "--set", "boot.initrd=initrd")
    assert code == 2
    assert err == f"kvmpy: --set boot.initrd: {here}/initrd: is 20 MiB, more than the guest's memory of 16 MiB\n"


def test_a_path_cannot_put_a_second_line_or_an_escape_sequence_on_the_terminal(kvmpy: Kvmpy, here: Path) -> None:
    code, _, err = kvmpy("check", "m.toml", "--set", "boot.kernel=a\nb\x1b[31m")
    assert code == 2
    assert err.startswith(f"kvmpy: --set boot.kernel: {here}/a\\nb\\x1b[31m: cannot be opened")
    assert err.count("\n") == 1


# What the options say


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--set", "machine.memory"], "--set machine.memory: expected KEY=VALUE"),
        (["--set", "device.x.bus=r"], "--set device.x.bus: no device has the id 'x'"),
        (["--set", "machine.cpus=no"], '--set machine.cpus: expected an integer, got a string ("no")'),
        (["--set", "boot.kernel=/absent"], "--set boot.kernel: /absent: cannot be opened"),
        (
            [
                "--set=netdev=[{type='tap', id='t', ifname='t'}]",
                "--set=device=[{driver='virtio-net-pci', id='n', netdev='t'}]",
                "--set=device.n.failover=1",
            ],
            "--set device.n.failover: expected true or false, got an integer (1)",
        ),
        (
            ["--set", "machine.dirty_ring=true"],
            "--set machine.dirty_ring: this version of kvmpy logs dirty pages in the bitmap only",
        ),
        (["--name", "../x"], f'--name: {NAME_FORM}, got "../x"'),
    ],
    ids=["no value", "no such id", "wrong type", "no such file", "by id", "not yet", "no name"],
)
def test_a_mistake_in_an_option_is_located_there(kvmpy: Kvmpy, here: Path, options: list[str], problem: str) -> None:
    (here / "m.toml").write_text("device = []\n" + GOOD)
    code, _, err = kvmpy("check", "m.toml", *options)
    assert code == 2
    assert err.startswith(f"kvmpy: {problem}")


def test_a_trace_glob_that_matches_nothing_says_what_there_is(kvmpy: Kvmpy) -> None:
    code, _, err = kvmpy("run", "m.toml", "--trace", "bsu.*")
    assert code == 2
    assert err.startswith("kvmpy: --trace bsu.*: matches none of ")
    assert "bus.write" in err


@pytest.mark.parametrize("limit", ["nan", "inf", "-1", "soon", "1e9"])
@pytest.mark.parametrize("command", [["run", "m.toml", "--powerdown-limit"], ["powerdown", "m", "--limit"]])
def test_a_limit_that_is_no_time_is_refused(kvmpy: Kvmpy, command: list[str], limit: str) -> None:
    code, _, err = kvmpy(*command, limit)
    assert code == 2
    assert f"expected seconds, 0 to 86400, got '{limit}'" in err


def test_the_version_is_said(kvmpy: Kvmpy) -> None:
    assert kvmpy("--version") == (0, f"kvmpy {__version__}\n", "")


def test_no_command_at_all_is_a_usage_error(kvmpy: Kvmpy) -> None:
    code, out, err = kvmpy()
    assert (code, out) == (2, "")
    assert err.startswith("usage: kvmpy ")
    assert "required: COMMAND" in err


def test_an_unknown_command_is_answered_with_those_there_are(kvmpy: Kvmpy) -> None:
    code, _, err = kvmpy("rnu")
    assert code == 2
    assert "invalid choice: 'rnu'" in err
    assert "'run'" in err


def test_a_surplus_argument_is_answered_with_the_usage_of_that_command(kvmpy: Kvmpy) -> None:
    code, _, err = kvmpy("status", "m", "n")
    assert code == 2
    assert err.startswith("usage: kvmpy status ")
    assert err.endswith("kvmpy status: error: unrecognized arguments: n\n")


def test_an_error_has_no_traceback(kvmpy: Kvmpy) -> None:
    assert kvmpy("run", "absent.toml") == (
        2,
        "",
        "kvmpy: absent.toml: cannot be read: ENOENT (No such file or directory)\n",
    )


@pytest.mark.parametrize("argv", [["--debug", "check", "absent.toml"], ["check", "--debug", "absent.toml"]])
def test_debug_shows_the_traceback_too_wherever_it_is_said(kvmpy: Kvmpy, argv: list[str]) -> None:
    code, _, err = kvmpy(*argv)
    assert code == 2
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("kvmpy: absent.toml: cannot be read: ENOENT (No such file or directory)\n")


def test_a_good_configuration_is_described(kvmpy: Kvmpy) -> None:
    said = "m.toml: ok: m: ELF vmlinux, PVH entry 0x100000, 1 vCPU, 16 MiB\n"
    assert kvmpy("check", "m.toml") == (0, said, "")


# The host


@pytest.fixture
def kvm(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the commands take for /dev/kvm."""
    device = here / "kvm"
    device.touch()
    monkeypatch.setattr(System.__init__, "__defaults__", (str(device),))
    return device


def answering(monkeypatch: pytest.MonkeyPatch, **capabilities: int) -> None:
    """Have every ioctl answer like a KVM that has all capabilities but for those said."""
    numbers = {abi.capability(name): value for name, value in capabilities.items()}

    def sys_ioctl(name: str, fd: int, request: int, argument: Any) -> int:
        if name == "KVM_GET_API_VERSION":
            return abi.API_VERSION
        if name == "KVM_CHECK_EXTENSION":
            return numbers.get(int(ffi.cast("uintptr_t", argument)), 1)
        raise IoctlError(name, errno.ENOTTY)

    monkeypatch.setattr(ioctl, "sys_ioctl", sys_ioctl)


def test_a_missing_dev_kvm_is_named_with_what_to_do(kvmpy: Kvmpy, kvm: Path) -> None:
    kvm.unlink()
    code, _, err = kvmpy("run", "m.toml")
    assert code == 1
    assert err.startswith(f"kvmpy: {kvm}: ENOENT: this host has no KVM: load kvm_intel or kvm_amd")


def test_a_forbidden_dev_kvm_is_named_with_what_to_do(kvmpy: Kvmpy, kvm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_any = os.open

    def open_but_kvm(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == str(kvm):  # root may open anything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return open_any(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_but_kvm)
    code, _, err = kvmpy("run", "m.toml")
    assert code == 1
    assert err.startswith(f"kvmpy: {kvm}: EACCES: not permitted: run as root, or join the group")


def test_a_dev_kvm_that_is_something_else_is_refused(kvmpy: Kvmpy, kvm: Path) -> None:
    code, _, err = kvmpy("run", "m.toml")
    assert (code, err) == (1, f"kvmpy: {kvm}: is not KVM (KVM_GET_API_VERSION: ENOTTY)\n")


@pytest.mark.parametrize("capability", REQUIRED, ids=lambda capability: capability.name)
def test_a_missing_capability_is_named_with_the_kernel_that_has_it(
    kvmpy: Kvmpy, kvm: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[str, str]
) -> None:
    name, since = capability
    answering(monkeypatch, **{name: 0})
    code, _, err = kvmpy("run", "m.toml")
    assert code == 1
    assert err == f"kvmpy: {name}: this kernel's KVM does not have it; Linux {since} and later do\n"


def test_more_vcpus_than_kvm_gives_is_a_mistake_in_the_configuration(
    kvmpy: Kvmpy, kvm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, KVM_CAP_MAX_VCPUS=3)
    code, _, err = kvmpy("run", "m.toml", "--set", "machine.cpus=4")
    assert code == 2
    assert err == "kvmpy: --set machine.cpus: 4 vCPUs, and this host's KVM gives a machine at most 3\n"


def test_a_runtime_directory_that_cannot_be_made_is_named_with_what_to_do(
    kvmpy: Kvmpy, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(here / "kernel" / "run"))
    code, _, err = kvmpy("run", "m.toml")
    assert code == 1
    assert err.startswith(f"kvmpy: {here}/kernel/run: ENOTDIR: the runtime directory cannot be written; run as root, ")
    assert "KVMPY_RUNTIME_DIR" in err


def test_too_few_descriptors_are_an_error_that_says_how_to_have_more(here: Path) -> None:
    command = f"ulimit -n 8; exec {sys.executable} -m kvmpy run m.toml"
    ended = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].endswith("; raise the limit of open files (ulimit -n)")
    assert "Traceback" not in ended.stderr
    assert os.listdir(here / "run") == []


# Names of machines

BY_NAME: Final = ("status", "pause", "resume", "reset", "powerdown", "stop", "console", "qmp")


@pytest.mark.parametrize("command", BY_NAME)
@pytest.mark.parametrize("name", ["../x", "/etc", ".", "", "a b", "x/../../y"])
def test_what_is_no_name_is_refused_before_any_path_is_made_of_it(
    kvmpy: Kvmpy, here: Path, command: str, name: str
) -> None:
    (here / "x").mkdir()
    (here / "x" / "pid").write_text("1\n")
    assert kvmpy(command, name, *(["query-status"] if command == "qmp" else [])) == (
        2,
        "",
        f'kvmpy: NAME: {NAME_FORM}, got "{name}"\n',
    )


@pytest.mark.parametrize("command", BY_NAME)
def test_a_machine_that_does_not_run_is_an_error_of_the_host(kvmpy: Kvmpy, here: Path, command: str) -> None:
    assert kvmpy(command, "web1", *(["query-status"] if command == "qmp" else [])) == (
        1,
        "",
        f"kvmpy: web1: no such machine runs under {here}/run; running: none\n",
    )


@pytest.mark.parametrize("argument", ["limit", "=5"])
def test_an_argument_of_a_monitor_command_that_is_none_is_refused(kvmpy: Kvmpy, argument: str) -> None:
    code, _, err = kvmpy("qmp", "m", "system_powerdown", argument)
    assert code == 2
    assert err == f"kvmpy: {argument}: expected KEY=VALUE, where VALUE is JSON or else a string\n"


def test_ps_without_machines_is_a_heading_or_an_empty_list(kvmpy: Kvmpy) -> None:
    code, out, err = kvmpy("ps")
    assert (code, out.split(), err) == (0, ["NAME", "PID", "STATUS", "CPUS", "MEMORY", "DEVICES"], "")
    assert kvmpy("ps", "--json") == (0, "[]\n", "")


# The process around the commands


def shell(script: str) -> subprocess.CompletedProcess[str]:
    """``script`` with `kvmpy` as a function."""
    return subprocess.run(
        ["/bin/sh", "-c", f'kvmpy() {{ {sys.executable} -m kvmpy "$@"; }}; {script}'],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=60,
    )


def test_check_and_run_say_the_same_as_processes(here: Path) -> None:
    (here / "m.toml").write_text(GOOD + "cpuss = 1\n")
    said = "kvmpy: m.toml:5: machine.cpuss: unknown key 'cpuss' (did you mean 'cpus'?)\n"
    ended = shell("kvmpy check m.toml; echo $?; kvmpy run m.toml; echo $?")
    assert (ended.stdout, ended.stderr) == ("2\n2\n", said + said)
    assert os.listdir(here / "run") == []


@pytest.mark.parametrize("command", ["ps", "--version"])
def test_output_that_nobody_reads_is_an_error_without_words(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with it, argparse hears of it, and keeps it to itself
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        ended = subprocess.run([sys.executable, "-m", "kvmpy", command], stdout=output, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_output_to_a_full_disk_is_an_error_with_its_errno() -> None:
    ended = shell("kvmpy ps >/dev/full")
    assert ended.returncode == 1
    assert ended.stderr == "kvmpy: ENOSPC: No space left on device; make room on that file system\n"


def test_with_standard_error_full_the_exit_code_is_still_right() -> None:
    assert shell("kvmpy check absent.toml 2>/dev/full").returncode == 2


def test_with_standard_error_closed_nothing_of_it_goes_to_the_output() -> None:
    ended = shell("kvmpy check absent.toml 2>&-")
    assert (ended.returncode, ended.stdout) == (2, "")


def test_a_name_that_is_no_text_is_shown_all_the_same(here: Path) -> None:
    os.rename(b"m.toml", b"m\xff.toml")
    ended = shell("LC_ALL=C.UTF-8 kvmpy check \"$(printf 'm\\377.toml')\" --name m")
    assert ended.returncode == 0
    assert ended.stdout.startswith(r"m\udcff.toml: ok: m: ")


# Doctor


def verdicts(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.what: finding.verdict for finding in findings}


@pytest.fixture
def bare(here: Path) -> Host:
    """A host with nothing."""
    return Host(dev=str(here / "dev"), proc=str(here / "proc"), sys=str(here / "sys"))


@pytest.fixture
def rich(bare: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host with everything."""
    dev, sys_ = Path(bare.dev), Path(bare.sys)
    for name in ("kvm", "net/tun", "vhost-net", "vfio/vfio"):
        (dev / name).parent.mkdir(parents=True, exist_ok=True)
        (dev / name).touch()
    (sys_ / "kernel/iommu_groups/0").mkdir(parents=True)
    (sys_ / "bus/pci/drivers/vfio-pci").mkdir(parents=True)
    (sys_ / "kernel/mm/hugepages/hugepages-2048kB").mkdir(parents=True)
    (sys_ / "kernel/mm/hugepages/hugepages-2048kB/free_hugepages").write_text("7\n")
    Path(bare.proc).mkdir()
    Path(bare.proc, "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu vmx sse\n")
    Path(bare.proc, "interrupts").write_text("  2:  1  IR-IO-APIC  2-edge  timer\n")
    Path(bare.proc, "self").mkdir()
    Path(bare.proc, "self/status").write_text("Name:\tkvmpy\nCapEff:\t0000000000001000\n")
    answering(monkeypatch)
    return bare


def test_doctor_finds_nothing_to_mend_where_everything_is_there(rich: Host) -> None:
    findings = list(examine(rich))
    assert [finding for finding in findings if finding.verdict != "ok" and finding.what != "locked memory"] == []
    assert ("huge pages", "7 free of 2048kB (for machine.hugepages)") in [(f.what, f.found) for f in findings]


@pytest.mark.parametrize("text", ["xx", "", "eth0", "0000:00:05"])
def test_doctor_takes_what_is_no_address_for_a_mistake_in_the_command_line(kvmpy: Kvmpy, text: str) -> None:
    complaint = f'kvmpy: --device: {text!r}: expected a PCI address such as "0000:5e:00.2"\n'
    assert kvmpy("doctor", "--device", text) == (2, "", complaint)


def test_doctor_says_of_each_missing_thing_what_to_do(bare: Host) -> None:
    findings = list(examine(bare))
    assert verdicts(iter(findings)) | {"locked memory": "ok"} == {
        f"{bare.dev}/kvm": "fail",
        "hardware virtualization": "warn",
        "kernel": "ok",
        "memory": "ok",
        "huge pages": "ok",
        "runtime directory": "ok",
        f"{bare.dev}/net/tun": "warn",
        f"{bare.dev}/vhost-net": "warn",
        "CAP_NET_ADMIN": "warn",
        f"{bare.dev}/vfio/vfio": "warn",
        "vfio-pci": "warn",
        "IOMMU": "warn",
        "locked memory": "ok",
    }
    assert [finding.what for finding in findings if finding.verdict != "ok" and not finding.remedy] == []


@pytest.mark.parametrize(
    ("flags", "extension"), [("fpu vmx sse", "vmx"), ("fpu svm", "svm"), ("fpu svm_lock vmxnot", None), ("", None)]
)
def test_the_processors_virtualization_is_what_cpuinfo_says(here: Path, flags: str, extension: str | None) -> None:
    (here / "cpuinfo").write_text(f"processor\t: 0\nvmx flags\t: vnmi\nflags\t\t: {flags}\n")
    assert virtualization(str(here)) == extension
    assert virtualization(str(here / "absent")) is None


def test_doctor_names_a_missing_capability_and_the_kernel_that_has_it(
    rich: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, KVM_CAP_IRQFD=0, KVM_CAP_XSAVE2=0)
    findings = [finding for finding in examine(rich) if finding.what.startswith("KVM_CAP")]
    assert [(finding.what, finding.verdict) for finding in findings] == [
        ("KVM_CAP_IRQFD", "fail"),
        ("KVM_CAP_XSAVE2", "warn"),
    ]
    assert "Linux 2.6.32 and later" in findings[0].remedy
    assert "Linux 5.17 and later" in findings[1].remedy


def test_doctor_says_who_may_make_taps_and_bridges(rich: Host) -> None:
    Path(rich.proc, "self/status").write_text("CapPrm:\t000001ffffffffff\nCapEff:\t000001ffffffefff\n")
    (finding,) = [finding for finding in examine(rich) if finding.what == "CAP_NET_ADMIN"]
    assert (finding.verdict, finding.found) == ("warn", "not held; needed to make taps and bridges")
    assert "run as root" in finding.remedy


def test_doctor_opens_devices_and_names_what_went_wrong(rich: Host) -> None:
    Path(rich.dev, "vhost-net").unlink()
    Path(rich.dev, "vhost-net").mkdir()
    (finding,) = [finding for finding in examine(rich) if finding.what.endswith("vhost-net")]
    assert (finding.verdict, finding.found) == ("warn", "EISDIR; needed for packets that stay in the kernel")
    assert finding.remedy == "modprobe vhost_net"


def test_doctor_finds_a_runtime_directory_that_is_none(bare: Host, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(here / "kernel"))
    assert verdicts(examine(bare))["runtime directory"] == "fail"


def test_doctor_goes_on_where_it_may_not_look_at_the_runtime_directory(
    bare: Host, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, stat, access = here / "closed", os.stat, os.access
    closed.mkdir()

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(errno.EACCES, "")
        return stat(path, **options)

    monkeypatch.setenv("KVMPY_RUNTIME_DIR", f"{closed}/run")
    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    found = {finding.what: finding for finding in examine(bare)}
    assert found["runtime directory"].found == f"{closed} is not writable"
    assert "CAP_NET_ADMIN" in found


def test_a_report_fails_where_a_finding_does(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("memory", "ok", "512 MiB"), Finding("/dev/kvm", FAIL, "ENOENT", "load kvm_intel")]
    assert report(findings, as_json=False) == 1
    assert capsys.readouterr().out == "ok    memory: 512 MiB\nfail  /dev/kvm: ENOENT\n      load kvm_intel\n"


def test_a_report_without_failures_is_a_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert report([Finding("IOMMU", "warn", "no groups", "switch it on")], as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"what": "IOMMU", "verdict": "warn", "found": "no groups", "remedy": "switch it on"}
    ]
