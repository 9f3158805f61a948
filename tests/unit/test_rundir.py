"""The runtime directory: a name belongs to one living process, and comes back however that ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.errors import HostError
from kvmpy.host import rundir
from kvmpy.host.rundir import LONGEST_SOCKET_PATH, Running, RuntimeDirectory, find, running
from tests.fakes.loop import BOUND, open_descriptors

HOLD = "import sys; from kvmpy.host.rundir import *; d = RuntimeDirectory('web'); print(flush=True); sys.stdin.read()"


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(rundir.OVERRIDE, str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the name "web" until its standard input ends, and then goes without closing."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_directory_is_there_with_our_pid_and_goes_with_close(base: Path) -> None:
    directory = RuntimeDirectory("web")
    assert Path(directory.file("pid")).read_text() == f"{os.getpid()}\n"
    assert (base / "web").stat().st_mode & 0o777 == 0o750
    directory.close()
    directory.close()
    assert os.listdir(base) == []


def test_close_takes_everything_in_it_away(base: Path) -> None:
    directory = RuntimeDirectory("web")
    Path(directory.file("qmp.sock")).touch()
    Path(directory.file("console.sock")).touch()
    directory.close()
    assert not (base / "web").exists()


def test_name_is_refused_twice_in_one_process_and_kept() -> None:
    first = RuntimeDirectory("web")
    before = open_descriptors()
    with pytest.raises(
        HostError, match=rf"name: 'web' is running already, process {os.getpid()}; stop it \(kvmpy stop"
    ):
        RuntimeDirectory("web")
    assert open_descriptors() == before
    assert find("web") is not None
    first.close()


def test_name_of_another_process_is_refused_until_that_is_killed(
    other_process: subprocess.Popen[bytes], base: Path
) -> None:
    with pytest.raises(HostError, match=f"running already, process {other_process.pid}"):
        RuntimeDirectory("web")
    other_process.kill()
    other_process.wait()
    (base / "web" / "qmp.sock").touch()
    directory = RuntimeDirectory("web")
    assert os.listdir(directory.path) == ["pid"]
    assert find("web") == Running("web", os.getpid(), str(base / "web"))
    directory.close()


def test_two_names_live_side_by_side() -> None:
    one, other = RuntimeDirectory("a"), RuntimeDirectory("b")
    assert [machine.name for machine in running()] == ["a", "b"]
    one.close()
    assert [machine.name for machine in running()] == ["b"]
    other.close()


def test_asking_who_runs_does_not_take_the_lock_away() -> None:
    directory = RuntimeDirectory("web")
    assert find("web")
    assert running()
    with pytest.raises(HostError, match="running already"):
        RuntimeDirectory("web")
    directory.close()


def test_asking_for_a_dead_machine_takes_no_lock(base: Path) -> None:
    (base / "web").mkdir(parents=True)
    (base / "web" / "pid").write_text("1\n")
    assert find("web") is None
    assert running() == []
    RuntimeDirectory("web").close()


def test_pid_file_with_nothing_in_it_yet_is_of_an_unknown_process(base: Path) -> None:
    directory = RuntimeDirectory("web")
    os.truncate(directory.file("pid"), 0)
    assert find("web") == Running("web", 0, str(base / "web"))
    directory.close()


def test_strays_in_the_base_are_no_machines(base: Path) -> None:
    base.mkdir()
    assert running() == []
    (base / "file").touch()
    (base / "empty").mkdir()
    assert running() == []


def test_no_base_is_no_machines() -> None:
    assert running() == []
    assert find("web") is None


def test_machine_of_another_user_is_not_listed_and_does_not_hide_ours(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "trap").mkdir(parents=True)
    (base / "trap" / "pid").symlink_to("/dev/null")
    ours, theirs = RuntimeDirectory("ours"), RuntimeDirectory("theirs")
    opened = os.open

    def refused(path: str, flags: int, *rest: int) -> int:
        if path == theirs.file("pid"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, flags, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        assert [machine.name for machine in running()] == ["ours"]
        with pytest.raises(HostError, match="theirs: EACCES: not permitted; run as the user who started it"):
            find("theirs")
    ours.close()
    theirs.close()


def test_name_that_comes_and_goes_in_many_threads_is_never_anothers() -> None:
    holders = 0
    most = 0
    faults: list[BaseException] = []

    def come_and_go() -> None:
        nonlocal holders, most
        taken = 0
        for _ in range(5000):
            try:
                directory = RuntimeDirectory("web")
            except HostError as e:
                if "running already" not in str(e):
                    faults.append(e)
                continue
            holders += 1
            most = max(most, holders)
            Path(directory.file("qmp.sock")).touch()
            if not Path(directory.file("qmp.sock")).exists():
                faults.append(AssertionError("somebody took our socket away"))
            holders -= 1
            directory.close()
            taken += 1
            if taken == 30:
                return

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert faults == []
    assert most == 1


def test_directory_that_a_leaving_machine_takes_from_under_us_is_made_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, made = os.mkdir, []

    def mkdir_and_lose_it_once(path: str, mode: int = 0o777) -> None:
        mkdir(path, mode)
        made.append(path)
        if made.count(str(base / "web")) == 1 and path == str(base / "web"):
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", mkdir_and_lose_it_once)
    directory = RuntimeDirectory("web")
    assert find("web")
    directory.close()


def test_pid_file_goes_last_so_that_a_successors_sockets_stay(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RuntimeDirectory("web")
    for name in ("qmp.sock", "console.sock"):
        Path(directory.file(name)).touch()
    gone: list[str] = []
    unlink = os.unlink

    def noted(path: str) -> None:
        gone.append(os.path.basename(path))
        unlink(path)

    monkeypatch.setattr(os, "unlink", noted)
    directory.close()
    assert gone[-1] == "pid"
    assert sorted(gone) == ["console.sock", "pci.json.new", "pid", "qmp.sock"]


def test_name_too_long_for_a_socket_says_by_how_much(base: Path) -> None:
    room = LONGEST_SOCKET_PATH - len(str(base)) - len("//console.sock")
    RuntimeDirectory("n" * room).close()
    with pytest.raises(HostError, match="too long for a socket by 3 bytes"):
        RuntimeDirectory("n" * (room + 1) + "é")


@pytest.mark.parametrize("in_the_way", ["run", "run/web"])
def test_file_in_the_place_of_a_directory_is_named_with_what_to_do(tmp_path: Path, in_the_way: str) -> None:
    (tmp_path / in_the_way).parent.mkdir(exist_ok=True)
    (tmp_path / in_the_way).touch()
    before = open_descriptors()
    with pytest.raises(
        HostError,
        match=rf"{tmp_path}/run.*: (E(EXIST|NOTDIR): the runtime directory cannot|is not a directory that only)",
    ):
        RuntimeDirectory("web")
    assert open_descriptors() == before


@pytest.mark.parametrize("call", ["write", "open", "mkdir"])
def test_full_disk_is_a_host_error_that_leaves_nothing(base: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    base.mkdir()
    before = open_descriptors()
    said = "ENOSPC: the runtime directory cannot be written; make room on that file system$"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(HostError, match=said):
            RuntimeDirectory("web")
    assert open_descriptors() == before
    assert os.listdir(base) == []
    RuntimeDirectory("web").close()


def test_pid_file_that_is_a_symbolic_link_is_refused(base: Path, tmp_path: Path) -> None:
    (base / "web").mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    (base / "web" / "pid").symlink_to(tmp_path / "precious")
    with pytest.raises(HostError, match="ELOOP"):
        RuntimeDirectory("web")
    assert (tmp_path / "precious").read_text() == "precious"


def test_base_is_where_the_environment_says_or_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(rundir.OVERRIDE)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert rundir.base() == "/run/kvmpy"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert rundir.base() == "/run/user/7/kvmpy"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert rundir.base() == "/run/user/1000/kvmpy"


def test_a_directory_that_holds_something_else_is_refused_and_left_alone(base: Path) -> None:
    (base / "web").mkdir(parents=True)
    (base / "web" / "disk.img").write_text("precious")
    with pytest.raises(HostError, match=r"holds 'disk\.img', so it is not a machine's directory"):
        RuntimeDirectory("web")
    assert (base / "web" / "disk.img").read_text() == "precious"


def test_a_symlink_in_place_of_the_directory_is_refused(base: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    base.mkdir(exist_ok=True)
    (base / "web").symlink_to(victim)
    with pytest.raises(HostError, match="is not a directory that only its owner"):
        RuntimeDirectory("web")
    assert os.listdir(victim) == []


def test_a_directory_that_others_can_write_to_is_refused(base: Path) -> None:
    (base / "web").mkdir(parents=True)
    (base / "web").chmod(0o777)
    with pytest.raises(HostError, match="is not a directory that only its owner"):
        RuntimeDirectory("web")


def test_a_file_that_appears_meanwhile_outlives_the_machine(base: Path) -> None:
    directory = RuntimeDirectory("web")
    Path(directory.file("notes")).write_text("precious")
    directory.close()
    assert os.listdir(base / "web") == ["notes"]
