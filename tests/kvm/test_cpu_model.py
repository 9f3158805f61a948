"""A processor described, adopted by another machine, and shared by a baseline, on the real KVM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy.config.schema import load
from kvmpy.errors import ConfigError, IoctlError
from kvmpy.kvm import cpu_baseline
from kvmpy.kvm.cpu_features import Word
from kvmpy.kvm.cpu_model import adopt, describe_guest, describe_host, differences
from kvmpy.kvm.cpuid import CpuidLeaf, guest_cpuid
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vcpu_state import save
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import RunState
from kvmpy.state import load as decode
from kvmpy.state import save as encode
from tests.fakes.pvh_kernel import pvh_kernel
from tests.kvm.conftest import MakeGuest

SPIN = b"\xeb\xfe"
ARAT_BIT = 2  # of leaf 6: a feature that KVM offers everywhere


@pytest.fixture
def make_vcpu(make_guest: MakeGuest) -> Callable[[], Vcpu]:
    def make() -> Vcpu:
        vcpu = make_guest(irqchip=True).vcpu
        vcpu.set_cpuid(guest_cpuid(vcpu.vm.system.supported_cpuid(), 0, 1, tsc_deadline=True))
        return vcpu

    return make


def leaf_of(vcpu: Vcpu, function: int) -> dict[str, int]:
    return next(leaf for leaf in vcpu.cpuid if leaf["function"] == function)


def test_a_guest_can_go_where_it_came_from(make_vcpu: Callable[[], Vcpu]) -> None:
    guest = decode(type(described := describe_guest(make_vcpu())), json.loads(json.dumps(encode(described))))
    assert guest == described
    assert differences(guest, describe_host(make_vcpu())) == []
    assert guest.tsc_khz > 0
    assert guest.vendor in ("GenuineIntel", "AuthenticAMD")


def test_the_guest_keeps_its_cpuid_and_its_msrs_on_a_host_with_more(make_vcpu: Callable[[], Vcpu]) -> None:
    source, destination = make_vcpu(), make_vcpu()
    for leaf in source.cpuid:
        if leaf["function"] == 6:
            leaf["eax"] &= ~(1 << ARAT_BIT)
    cpu = describe_guest(source)
    assert Word(6, 0, "eax").bit(ARAT_BIT) == "CPUID 6 EAX bit 2 (arat)"
    cpu.msrs = tuple(index for index in cpu.msrs if index != 0x277)
    adopt([destination], cpu)
    assert leaf_of(destination, 6)["eax"] & 1 << ARAT_BIT == 0
    assert 0x277 not in dict(save(destination).msrs)
    assert describe_guest(destination).cpuid == cpu.cpuid
    assert describe_guest(destination).msrs == cpu.msrs


def test_what_kvm_refuses_of_a_processor_is_named(make_vcpu: Callable[[], Vcpu]) -> None:
    cpu = describe_guest(make_vcpu())
    cpu.cpuid = tuple(CpuidLeaf(function=n) for n in range(1000))
    with pytest.raises(IoctlError, match=r"^vCPU 0: KVM_SET_CPUID2: E2BIG$"):
        adopt([make_vcpu()], cpu)


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "kvmpy", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.usefixtures("system")
def test_command_describes_this_host_and_intersects_files(tmp_path: Path) -> None:
    assert run_cli("cpu-baseline", "--output", "a.json", cwd=tmp_path).returncode == 0
    host = cpu_baseline.read(str(tmp_path / "a.json"))
    less = cpu_baseline.read(str(tmp_path / "a.json"))
    less.leaves[1, 0].ecx &= ~1
    (tmp_path / "b.json").write_text(cpu_baseline.text(less))
    done = run_cli("cpu-baseline", "a.json", "b.json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "fleet.json").write_text(done.stdout)
    both = cpu_baseline.read(str(tmp_path / "fleet.json"))
    assert both.leaves[1, 0].ecx == host.leaves[1, 0].ecx & ~1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "fleet.json"]


@pytest.mark.usefixtures("system")
def test_commands_of_the_page_make_a_baseline(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/cpu-baseline.md").read_text()
    describe, intersect = re.findall(r"^\$ kvmpy (.*)$", page, re.MULTILINE)
    assert run_cli(*describe.split(), cwd=tmp_path).returncode == 0
    assert run_cli(*describe.replace("host1", "host2").split(), cwd=tmp_path).returncode == 0
    assert run_cli(*intersect.split(), cwd=tmp_path).returncode == 0
    fleet, host = (cpu_baseline.read(str(tmp_path / name)) for name in ("fleet.json", "host1.json"))
    assert differences(fleet, host) == differences(host, fleet) == []


@pytest.fixture
def machine_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_vcpu: Callable[[], Vcpu]
) -> Callable[..., Machine]:
    """``machine_with(change)``: a machine whose baseline is this host's description, changed."""
    monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(tmp_path / "run"))
    cpu = describe_host(make_vcpu())

    def make(change: Callable[[dict[tuple[int, int], CpuidLeaf]], object]) -> Machine:
        change(cpu.leaves)
        (tmp_path / "fleet.json").write_text(cpu_baseline.text(cpu))
        (tmp_path / "kernel").write_bytes(pvh_kernel(SPIN))
        (tmp_path / "m.toml").write_text(
            '[machine]\nmemory = "16MiB"\ncpus = 2\ncpu = "fleet.json"\n'
            '[boot]\nkernel = "kernel"\n[console]\nserial = "null"\n'
        )
        return Machine(load(tmp_path / "m.toml"))

    return make


def test_a_machine_with_a_baseline_has_its_cpuid_on_every_vcpu(machine_with: Callable[..., Machine]) -> None:
    def without_arat(leaves: dict[tuple[int, int], CpuidLeaf]) -> None:
        leaves[6, 0].eax &= ~(1 << ARAT_BIT)

    with machine_with(without_arat) as machine:
        assert [leaf_of(vcpu, 6)["eax"] & 1 << ARAT_BIT for vcpu in machine.board.vcpus] == [0, 0]
        assert [leaf_of(vcpu, 1)["ebx"] >> 24 for vcpu in machine.board.vcpus] == [0, 1]
        machine.start()
        machine.reset()
        assert machine.state is RunState.RUNNING


def test_a_host_that_lacks_something_of_the_baseline_names_it_with_its_place(
    machine_with: Callable[..., Machine], tmp_path: Path
) -> None:
    def with_more(leaves: dict[tuple[int, int], CpuidLeaf]) -> None:
        leaves[1, 0].ecx |= 1 << 10 | 1 << 16  # two that no KVM gives

    with pytest.raises(ConfigError) as refused:
        machine_with(with_more)
    where, fleet = f"{tmp_path}/m.toml:4: machine.cpu: ", f"{tmp_path}/fleet.json: "
    assert list(refused.value.problems) == [
        f"{where}{fleet}CPUID 1 ECX bit 10 (cid): the baseline has it, this host's KVM does not",
        f"{where}{fleet}CPUID 1 ECX bit 16: the baseline has it, this host's KVM does not",
    ]


def test_a_reset_gives_back_the_processor_that_was_adopted(machine_with: Callable[..., Machine]) -> None:
    with machine_with(lambda leaves: None) as machine:
        cpu = describe_guest(machine.board.vcpus[0])
        cpu.leaves[6, 0].eax &= ~(1 << ARAT_BIT)
        machine.handoff.adopt_cpu(cpu)
        machine.start()
        machine.reset()
        assert machine.state is RunState.RUNNING
        assert [leaf_of(vcpu, 6)["eax"] & 1 << ARAT_BIT for vcpu in machine.board.vcpus] == [0, 0]
