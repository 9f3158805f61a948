"""A processor that every host of a fleet can give: what they all have, and no more.

A baseline is a CpuDescription in a file. Features are AND-ed, counts are the least, and of what is only told (the
model, the caches) the oldest host's is taken. The frequency of the TSC is each host's own. Hosts of two vendors have no
baseline: their system calls, and how their KVMs keep a guest's state, are not the same.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from typing import Final

from kvmpy.errors import HostError, errno_name
from kvmpy.kvm import msrs
from kvmpy.kvm.cpu_features import COUNTS, INVERTED, NAMES, Count
from kvmpy.kvm.cpu_model import FORMATS, XSAVE, CpuDescription, Key, differences, registers
from kvmpy.kvm.cpuid import CpuidLeaf
from kvmpy.state import StateError, load, save

FILE_MAX: Final = 1 << 20
SIGNATURE: Final = (0x1, 0)
HIGHEST: Final = ((0x0, 0), (0x7, 0), (0x4000_0000, 0), (0x8000_0000, 0))  # EAX: the last leaf, or subleaf, there is
FREQUENCIES: Final = (0x15, 0x16)  # of one host's clocks
VMX: Final = 1 << 5
LEGACY_AREA: Final = 576  # of XSAVE: the x87's and SSE's, and the header
NAMED: Final = "the baseline"


def read(path: str) -> CpuDescription:
    """The description in a file. Raises HostError, the path first."""
    try:
        with open(path, "rb") as file:
            text = file.read(FILE_MAX + 1)
    except OSError as e:
        raise HostError(f"{path}: {errno_name(e.errno or 0)}: cannot be read") from e
    advice = "make it with 'kvmpy cpu-baseline'"
    if len(text) > FILE_MAX:
        raise HostError(f"{path}: more than {FILE_MAX} bytes, so it is no CPU baseline; {advice}")
    try:
        return load(CpuDescription, json.loads(text))
    except (ValueError, RecursionError) as e:  # of the JSON, or of its encoding
        raise HostError(f"{path}: is not JSON; {advice}") from e
    except StateError as e:
        raise HostError(f"{path}: is no CPU baseline: {e}; {advice}") from e


def text(description: CpuDescription) -> str:
    """What `read` reads."""
    return json.dumps(save(description), indent=1) + "\n"


def intersection(hosts: Sequence[tuple[str, CpuDescription]]) -> CpuDescription:
    """What all the hosts, each with its name, can give a guest. Raises HostError where there is no such processor."""
    _one_vendor(hosts)
    descriptions = [description for _, description in hosts]
    oldest = min(descriptions, key=_age)
    tables = [description.leaves for description in descriptions]
    table = {key: leaf for key, leaf in oldest.leaves.items() if all(key in each for each in tables)}
    features = _feature_msrs(descriptions)
    leaves = {key: _leaf(key, leaf, [each[key] for each in tables]) for key, leaf in table.items()}
    if SIGNATURE in leaves and not _same_vmx(descriptions):
        leaves[SIGNATURE].ecx &= ~VMX
    _close(leaves)
    found = CpuDescription(
        cpuid=tuple(leaves.values()),
        msrs=tuple(sorted(set.intersection(*(set(each.msrs) for each in descriptions)))),
        feature_msrs=tuple(sorted(features.items())),
        tsc_control=all(each.tsc_control for each in descriptions),
        xsave_size=min(each.xsave_size for each in descriptions),
        nested_size=min(each.nested_size for each in descriptions),
    )
    for name, description in hosts:  # formats that no AND can bring together
        for problem in differences(found, description, NAMED):
            raise HostError(f"{name}: {problem}")
    return found


def _one_vendor(hosts: Sequence[tuple[str, CpuDescription]]) -> None:
    first, vendor = hosts[0][0], hosts[0][1].vendor
    for name, description in hosts[1:]:
        if description.vendor != vendor:
            raise HostError(
                f"{name}: a processor by {description.vendor!r}, and {first} has one by {vendor!r}: "
                "no guest can move between them, make a baseline for each vendor's hosts"
            )


def _age(description: CpuDescription) -> tuple[int, ...]:
    """Family, model and stepping, and to have one order of any two hosts, all the rest."""
    eax = description.leaves.get(SIGNATURE, CpuidLeaf()).eax
    family, model = eax >> 8 & 0xF, eax >> 4 & 0xF | eax >> 12 & 0xF0
    family += eax >> 20 & 0xFF if family == 0xF else 0
    rest = [number for leaf in description.cpuid for number in (leaf.function, leaf.index, *registers(leaf))]
    return (family, model, eax & 0xF, *rest)


def _leaf(key: Key, oldest: CpuidLeaf, all_of_it: list[CpuidLeaf]) -> CpuidLeaf:
    """One leaf of the baseline: the oldest host's, with what others lack taken out."""
    function, index = key
    made = CpuidLeaf(function, index, oldest.flags, *registers(oldest))
    for word in NAMES:
        if (word.function, word.subleaf) == key:
            bits = [getattr(leaf, word.register) for leaf in all_of_it]
            setattr(made, word.register, _and(bits))
    for count in COUNTS:
        if (count.function, count.subleaf) == key:
            _put_least(made, count, all_of_it)
    if key in HIGHEST:
        made.eax = min(leaf.eax for leaf in all_of_it)
    if function in FREQUENCIES:
        made.eax = made.ebx = made.ecx = made.edx = 0
    if function in FORMATS and len({registers(leaf) for leaf in all_of_it}) > 1:
        made.eax = made.ebx = made.ecx = made.edx = 0
    return made


def _put_least(made: CpuidLeaf, count: Count, all_of_it: list[CpuidLeaf]) -> None:
    least = min(count.of(getattr(leaf, count.register)) for leaf in all_of_it)
    mask = (1 << count.width) - 1 << count.shift
    setattr(made, count.register, getattr(made, count.register) & ~mask | least << count.shift)


def _close(leaves: dict[Key, CpuidLeaf]) -> None:
    """Leave out the XSAVE components that not all have, and the sizes that go with them."""
    areas = leaves.get((XSAVE, 0))
    if areas is None:
        return
    supervisor = leaves.get((XSAVE, 1), CpuidLeaf()).ecx
    for component in range(2, 63):
        if not (areas.eax | areas.edx << 32 | supervisor) >> component & 1:
            leaves.pop((XSAVE, component), None)
    parts = [leaves[XSAVE, n] for n in range(2, 32) if areas.eax >> n & 1 and (XSAVE, n) in leaves]
    areas.ebx = areas.ecx = max(LEGACY_AREA, *(part.ebx + part.eax for part in parts), LEGACY_AREA)


def _and(words: list[int]) -> int:
    found = words[0]
    for word in words[1:]:
        found &= word
    return found


def _feature_msrs(descriptions: list[CpuDescription]) -> dict[int, int]:
    """ARCH_CAPABILITIES as far as all have it, with every weakness that one has; others only where they agree."""
    values = [dict(each.feature_msrs) for each in descriptions]
    found: dict[int, int] = {}
    for index in sorted(set.intersection(*(set(each) for each in values))):
        of_all = [each[index] for each in values]
        if index == msrs.ARCH_CAPABILITIES:
            weaknesses = 0
            for value in of_all:
                weaknesses |= value & INVERTED
            found[index] = _and(of_all) & ~INVERTED | weaknesses
        elif len(set(of_all)) == 1:
            found[index] = of_all[0]
        elif index == msrs.PERF_CAPABILITIES:
            found[index] = 0
    return found


def _same_vmx(descriptions: list[CpuDescription]) -> bool:
    """Whether all hosts' VMX is alike: its capabilities are no bits that an AND would do for."""
    values = [{i: v for i, v in each.feature_msrs if i in msrs.VMX_CAPABILITIES} for each in descriptions]
    return all(each == values[0] for each in values)


def write(path: str, description: CpuDescription) -> None:
    """Put it into a file, whole or not at all; what is there and no file is written to. Raises HostError."""
    try:
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "w") as file:
                file.write(text(description))
        else:
            _replace(os.path.realpath(path), text(description))
    except OSError as e:
        raise HostError(f"{path}: {errno_name(e.errno or 0)}: cannot be written") from e


def _replace(path: str, content: str) -> None:
    beside = f"{path}.{os.getpid()}.new"
    with open(beside, "x") as file:  # not through somebody's link
        try:
            file.write(content)
            file.flush()
            os.replace(beside, path)
        except BaseException:
            os.unlink(beside)
            raise
