"""The agent: pid 1 of an emulated host, runs commands there for the process that owns the host.

One file of light modules, started with ``python -I -S``: an import costs ten times what it costs outside. It talks over
a virtio-serial port in frames, both ways: a header of kind, job and payload length, then the payload. Many jobs run at
once; the owner chooses their numbers.

Nothing is lost and nothing grows without bound. Output waits in the jobs' pipes while OUTGOING_LIMIT bytes wait for the
port, and each job may have STDIN_WINDOW bytes of input on the way, which the owner counts and TAKEN gives back. So the
agent always reads the port, and a job that reads nothing blocks nobody.

When the owner goes the port reports its end, and the agent ends. A pid 1 that ends, for whatever reason, is a kernel
panic: the host goes too, and its console shows why.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
import termios
import time

PORT_NAME = "kvmpy.agent"
PORT_POLL_SECONDS = 0.02  # the kernel learns of its ports a moment after the driver is there

HEADER = struct.Struct("<BII")  # kind, job, length of the payload
FRAME_LIMIT = 1 << 20  # arguments and environment come in one frame; the kernel's own limit for them is near
CHUNK = 1 << 15  # of input or output in one frame: fair to other jobs, and cheap for each byte
OUTGOING_LIMIT = 1 << 18
STDIN_WINDOW = 1 << 18
DRAIN_LIMIT = 1 << 20  # more than a pipe or terminal holds: what a job wrote before its end is within it

# From the owner. Plain numbers, not an enum: this file must start fast.
START = 1  # see start_payload
STDIN = 2  # bytes; none: end of file
SIGNAL = 3  # NUMBER, for the job's process group
RESIZE = 4  # SIZE, of the job's terminal
NUDGE = 10  # nothing, for NOBODY: that it comes is all
# To the owner.
READY = 5  # the agent runs
STDOUT = 6
STDERR = 7
TAKEN = 8  # NUMBER of bytes of input that no longer wait here
EXIT = 9  # NUMBER: code of the job's first process, negative for a signal; what it wrote came before

NOBODY = 0  # the number of no job

NUMBER = struct.Struct("<i")
SIZE = struct.Struct("<HH")  # rows, columns
WINSIZE = struct.Struct("HHHH")  # struct winsize, the last two unused

END_OF_INPUT_KEY = b"\x04"  # control-D, to a terminal
CANNOT_EXECUTE = 127  # as a shell says it


def start_payload(argv: list[str], env: dict[str, str], cwd: str, size: tuple[int, int] | None) -> bytes:
    """The payload of START; with a ``size`` the job gets a terminal. The kernel allows no NUL in any of the strings."""
    rows, columns = size or (0, 0)
    variables = [f"{name}={value}" for name, value in env.items()]
    return b"\0".join(map(os.fsencode, (str(rows), str(columns), cwd, str(len(argv)), *argv, *variables)))


class Job:
    """A command and what it left behind: the process group that its first process leads."""

    def __init__(self, number: int, pid: int, stdin: int, outputs: dict[int, int]) -> None:
        self.number, self.pid = number, pid
        self.stdin = stdin  # -1 once closed
        self.outputs = outputs  # descriptor to kind of frame, while open
        self.tty = stdin in outputs
        self.pending = bytearray()
        self.input_ended = False
        self.running = True

    def is_over(self) -> bool:
        """Nobody of the job's group is left, nor anyone who could still write to its outputs."""
        if self.running or self.outputs:
            return False
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return True
        return False


class Agent:
    def __init__(self, port: int) -> None:
        self.port = port
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.jobs: dict[int, Job] = {}
        self.wakeup, notify = os.pipe()
        for fd in (port, self.wakeup, notify):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # with no handler the wakeup descriptor is not written
        signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
        self.reply(READY, NOBODY)

    def run(self) -> None:
        """Serve until the owner is gone."""
        connected = True
        while connected:
            readers, writers = self.awaited()
            readable, writable, _ = select.select(readers, writers, [])
            if self.port in writable:
                del self.outgoing[: os.write(self.port, self.outgoing)]
            for job in list(self.jobs.values()):
                if job.stdin in writable:
                    self.feed(job)
                for fd in [fd for fd in job.outputs if fd in readable]:
                    self.forward(job, fd)
            if self.wakeup in readable:
                os.read(self.wakeup, CHUNK)
                self.reap()
            if self.port in readable:
                connected = self.receive()

    def awaited(self) -> tuple[list[int], list[int]]:
        """The descriptors to wait for: those to read from, those to write to."""
        readers, writers = [self.port, self.wakeup], []
        if self.outgoing:
            writers.append(self.port)
        for job in self.jobs.values():
            if job.pending:
                writers.append(job.stdin)
            if len(self.outgoing) < OUTGOING_LIMIT:
                readers.extend(job.outputs)
        return readers, writers

    def reply(self, kind: int, number: int, payload: bytes = b"") -> None:
        self.outgoing += HEADER.pack(kind, number, len(payload)) + payload

    def receive(self) -> bool:
        """Act on what the owner sent; False when there is no owner any more."""
        data = os.read(self.port, CHUNK)
        self.incoming += data
        while len(self.incoming) >= HEADER.size:
            kind, number, length = HEADER.unpack_from(self.incoming)
            end = HEADER.size + length
            if len(self.incoming) < end:
                break
            payload = bytes(self.incoming[HEADER.size : end])
            del self.incoming[:end]
            self.act(kind, number, payload)
        return bool(data)

    def act(self, kind: int, number: int, payload: bytes) -> None:
        if kind == START:
            self.jobs[number] = start(number, payload)
        elif (job := self.jobs.get(number)) is None:
            return  # it ended while this was on the way
        elif kind == STDIN:
            job.pending += payload
            job.input_ended = job.input_ended or not payload
            self.feed(job)
        elif kind == SIGNAL:
            send_signal(job, *NUMBER.unpack(payload))
        elif kind == RESIZE and job.stdin >= 0:
            resize(job.stdin, *SIZE.unpack(payload))

    def feed(self, job: Job) -> None:
        """Write input to the job as far as it takes it; what nobody will read any more counts as taken."""
        taken = len(job.pending)
        if job.pending and job.stdin >= 0:
            try:
                taken = os.write(job.stdin, job.pending)
            except BlockingIOError:
                taken = 0
            except BrokenPipeError:
                job.input_ended = True
        if taken:
            del job.pending[:taken]
            self.reply(TAKEN, job.number, NUMBER.pack(taken))
        if job.input_ended and not job.pending and job.stdin >= 0:
            if job.tty:
                os.write(job.stdin, END_OF_INPUT_KEY)
                job.input_ended = False
            else:
                os.close(job.stdin)
                job.stdin = -1

    def forward(self, job: Job, fd: int) -> int:
        """Pass on what the job wrote, and say how much; close ``fd`` at its end."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno != errno.EIO:  # the way a terminal says that nobody has it open
                raise
            data = b""
        if data:
            self.reply(job.outputs[fd], job.number, data)
            return len(data)
        del job.outputs[fd]
        os.close(fd)
        if fd == job.stdin:
            job.stdin = -1
            self.feed(job)
        self.forget(job)
        return 0

    def reap(self) -> None:
        """Collect processes that ended: first ones of jobs, and whatever else pid 1 inherits."""
        leaders = {job.pid: job for job in self.jobs.values() if job.running}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if job := leaders.get(pid):
                self.end(job, os.waitstatus_to_exitcode(status))
        for job in list(self.jobs.values()):
            self.forget(job)

    def end(self, job: Job, code: int) -> None:
        """Report the end of a job's first process, after all that it wrote. Others may go on writing."""
        for fd in list(job.outputs):
            left = DRAIN_LIMIT
            while left > 0 and fd in job.outputs and (length := self.forward(job, fd)):
                left -= length
        job.running = False
        self.reply(EXIT, job.number, NUMBER.pack(code))

    def forget(self, job: Job) -> None:
        if job.is_over():
            if job.stdin >= 0:
                os.close(job.stdin)
            self.jobs.pop(job.number, None)


def start(number: int, payload: bytes) -> Job:
    rows, columns, cwd, count, *strings = payload.split(b"\0")
    argv, variables = strings[: int(count)], strings[int(count) :]
    env = dict(variable.split(b"=", 1) for variable in variables)
    if int(rows):
        ours, theirs = os.openpty()
        resize(ours, int(rows), int(columns))
        child, stdin, outputs = (theirs, theirs, theirs), ours, {ours: STDOUT}
    else:
        (stdin_read, stdin), (stdout, stdout_write), (stderr, stderr_write) = os.pipe(), os.pipe(), os.pipe()
        child, outputs = (stdin_read, stdout_write, stderr_write), {stdout: STDOUT, stderr: STDERR}
    for fd in (stdin, *outputs):
        os.set_blocking(fd, False)
    pid = os.fork()
    if pid == 0:
        execute(argv, env, cwd, child, tty=stdin in outputs)
    for fd in set(child):
        os.close(fd)
    return Job(number, pid, stdin, outputs)


def execute(
    argv: list[bytes], env: dict[bytes, bytes], cwd: bytes, descriptors: tuple[int, int, int], *, tty: bool
) -> None:
    """Become the job's command. Runs in the child, and does not return."""
    try:
        os.setsid()
        if tty:
            fcntl.ioctl(descriptors[0], termios.TIOCSCTTY, 0)
        for standard, fd in enumerate(descriptors):
            os.dup2(fd, standard)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # what Python ignores stays ignored across execve
            signal.signal(number, signal.SIG_DFL)
        os.chdir(cwd)
        os.execvpe(argv[0], argv, env)
    except OSError as error:
        os.write(2, b"%s: %s\n" % (argv[0], os.fsencode(error.strerror or str(error))))
    finally:
        os._exit(CANNOT_EXECUTE)


def send_signal(job: Job, number: int) -> None:
    """Signal everyone in the job's group; its first process alone where that has not made the group yet."""
    try:
        os.killpg(job.pid, number)
    except ProcessLookupError:
        if job.running:
            os.kill(job.pid, number)


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, WINSIZE.pack(rows, columns, 0, 0))


def open_port() -> int:
    """Open the port by its name: without udev there is no /dev/virtio-ports."""
    ports = "/sys/class/virtio-ports"
    while True:
        for device in os.listdir(ports):
            with open(f"{ports}/{device}/name") as file:
                if file.read().strip() == PORT_NAME:
                    return os.open(f"/dev/{device}", os.O_RDWR | os.O_CLOEXEC)
        time.sleep(PORT_POLL_SECONDS)


if __name__ == "__main__":
    Agent(open_port()).run()
