"""The lab itself: what tests on an emulated host rely on."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import uuid

import pytest

from scripts.lab.errors import HostGone, LabError, LabTimeout
from scripts.lab.host import EmulatedHost
from scripts.lab.images import Images
from scripts.lab.kernels import CHECKOUT
from scripts.lab.process import WAIT_SECONDS

KVM_VERSION = """
import fcntl, os
KVM_GET_API_VERSION = 0xAE00
print(fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), KVM_GET_API_VERSION))
"""

# Starts a host, says which process it is, and then does nothing about its end.
OWNER = """
import signal
from scripts.lab.host import EmulatedHost
host = EmulatedHost(cpus=1, memory="1G")
host.start()
print(host.pid, flush=True)
signal.pause()
"""

MANY_LINES = 5 * 1024 * 1024 // 8  # 5 MiB in lines of 8 bytes


def test_the_exit_code_comes_back(host: EmulatedHost) -> None:
    assert host.run(["sh", "-c", "exit 42"]).returncode == 42


def test_stdout_and_stderr_are_kept_apart(host: EmulatedHost) -> None:
    done = host.run(["sh", "-c", "echo out; echo err >&2"])
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_a_command_that_does_not_exist_is_127(host: EmulatedHost) -> None:
    done = host.run(["no-such-command"])
    assert (done.returncode, done.stderr) == (127, "no-such-command: No such file or directory\n")


def test_a_failed_command_raises_when_checked(host: EmulatedHost) -> None:
    with pytest.raises(LabError, match="ended with 1"):
        host.run(["false"], check=True)


def test_an_idle_host_gets_an_interrupt_now_and_then(host: EmulatedHost) -> None:
    """Or a guest keeps the processor after one that QEMU lost: see NUDGE_SECONDS."""
    port = "awk '/-virtqueues/ {print $2}' /proc/interrupts"
    many = 20  # far more than what starting a command takes
    waiting = f"end=$(( $({port}) + {many} )); until [ $({port}) -ge $end ]; do sleep 0.5; done"
    assert host.run(["sh", "-c", waiting]).returncode == 0


def test_input_is_forwarded(host: EmulatedHost) -> None:
    assert host.run(["tr", "a-z", "A-Z"], input="some input\n").stdout == "SOME INPUT\n"


def test_more_input_than_the_window_arrives(host: EmulatedHost) -> None:
    size = 1 << 20
    assert host.run(["wc", "-c"], input=bytes(size)).stdout.strip() == str(size)


def test_a_command_that_reads_no_input_is_not_in_the_way(host: EmulatedHost) -> None:
    assert host.run(["true"], input=bytes(1 << 20)).returncode == 0


def test_much_output_is_intact(host: EmulatedHost) -> None:
    done = host.run(["seq", "-f", "%07.0f", str(MANY_LINES)])
    assert done.stdout == "".join(f"{number:07}\n" for number in range(1, MANY_LINES + 1))


def test_a_terminal_echoes_and_has_the_size_asked_for(host: EmulatedHost) -> None:
    process = host.spawn(["sh", "-c", "tty && stty size; read -r line; echo got $line"], tty=True, size=(40, 132))
    process.expect("/dev/pts/")
    process.expect("40 132\r\n")
    process.send("typed\n")
    process.expect("typed\r\ngot typed")
    assert process.wait() == 0


def test_a_terminal_can_be_resized(host: EmulatedHost) -> None:
    process = host.spawn(["sh", "-c", "echo ready; read -r line; stty size"], tty=True)
    process.expect("ready")
    process.resize(50, 100)
    process.send("\n")
    process.expect("50 100")
    assert process.wait() == 0


def test_commands_run_at_the_same_time(host: EmulatedHost) -> None:
    fifo = f"/run/{uuid.uuid4()}"
    host.run(["mkfifo", fifo], check=True)
    reader = host.spawn(["cat", fifo])
    writer = host.spawn(["sh", "-c", f"echo across >{fifo}"])
    assert (reader.wait(), writer.wait(), reader.output) == (0, 0, "across\n")


def test_a_signal_ends_the_whole_process_group(host: EmulatedHost) -> None:
    process = host.spawn(["sh", "-c", "sleep 1000 & echo child $!; wait"])
    child = process.expect(re.compile(r"child (\d+)\n"))[1]
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    await_end(host, child)


def test_what_a_command_leaves_behind_can_still_be_signalled(host: EmulatedHost) -> None:
    process = host.spawn(["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo child $!"])
    child = process.expect(re.compile(r"child (\d+)\n"))[1]
    assert process.wait() == 0
    process.signal(signal.SIGTERM)
    await_end(host, child)


def test_a_command_that_takes_too_long_is_killed_and_shown(host: EmulatedHost) -> None:
    with pytest.raises(LabTimeout, match=r"child \d+\s+--- console of the emulated host") as caught:
        host.run(["sh", "-c", "echo child $$; sleep 1000"], timeout=10)
    await_end(host, re.findall(r"child (\d+)", str(caught.value))[0])


def test_waiting_for_output_that_cannot_come_ends_with_the_command(host: EmulatedHost) -> None:
    process = host.spawn(["echo", "something else"])
    with pytest.raises(LabError, match="ended with 0 and never wrote 'awaited'"):
        process.expect("awaited")


def test_kvm_answers(host: EmulatedHost) -> None:
    assert host.run(["python", "-I", "-S", "-c", KVM_VERSION], check=True).stdout == "12\n"


@pytest.mark.parametrize("device", ["/dev/vhost-net", "/dev/net/tun", "/dev/vfio/vfio"])
def test_a_device_that_kvmpy_uses_is_there(host: EmulatedHost, device: str) -> None:
    assert host.run(["test", "-c", device]).returncode == 0


def test_modules_can_be_inserted(host: EmulatedHost) -> None:
    assert host.run(["modprobe", "dummy"], check=True).stderr == ""


def test_the_loopback_interface_is_up(host: EmulatedHost) -> None:
    assert "LOOPBACK,UP" in host.run(["ip", "link", "show", "lo"], check=True).stdout


def test_the_checkout_is_where_it_is_outside(host: EmulatedHost) -> None:
    assert host.run(["pwd"]).stdout == f"{CHECKOUT}\n"
    assert host.run(["cat", "pyproject.toml"]).stdout == (CHECKOUT / "pyproject.toml").read_text()


def test_the_virtual_environment_comes_first(host: EmulatedHost) -> None:
    assert host.run(["python", "-S", "-c", "import sys; print(sys.executable)"]).stdout == f"{sys.prefix}/bin/python\n"


def test_a_write_inside_does_not_appear_outside(host: EmulatedHost) -> None:
    name = f"written-inside-{uuid.uuid4()}"
    host.write_file(CHECKOUT / name, "inside")
    assert host.run(["cat", name]).stdout == "inside"
    assert not (CHECKOUT / name).exists()


def test_a_host_ends_when_its_owner_is_killed(lab_images: Images) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner, owner.stdout:
        pid = int(owner.stdout.readline())
        qemu = os.pidfd_open(pid)
        owner.kill()
    with os.fdopen(qemu) as ended:
        assert select.select([ended], [], [], WAIT_SECONDS)[0], f"process {pid} is still there"


def test_a_host_that_crashes_says_why(lab_images: Images) -> None:
    with (
        EmulatedHost(cpus=1, memory="1G") as host,
        pytest.raises(HostGone, match="sysrq triggered crash"),
    ):
        host.run(["sh", "-c", "echo c >/proc/sysrq-trigger"])


@pytest.mark.parametrize(("command", "code"), [("exit 5", 5), ("kill -TERM $$", 143)])
def test_the_command_line_runs_a_command(lab_images: Images, command: str, code: int) -> None:
    script = f"cat; echo to-stderr >&2; {command}"
    lab = [sys.executable, "-m", "scripts.lab", "run", "--cpus", "1", "--memory", "1G", "--", "sh", "-c", script]
    done = subprocess.run(lab, cwd=CHECKOUT, input="through", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "through")
    assert re.search(r"^emulated host up in [\d.]+ s\nto-stderr\n$", done.stderr)


def await_end(host: EmulatedHost, pid: str) -> None:
    """Wait until a process of the host is gone."""
    host.run(["sh", "-c", 'while [ -e "/proc/$0" ]; do sleep 0.05; done', pid], check=True)
