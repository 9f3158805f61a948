"""MAC and VLAN of virtual functions, set through their PFs by the network helper, and put back."""

from __future__ import annotations

import errno
from functools import partial
from typing import Any, Final

from kvmpy.errors import HostError
from kvmpy.host.changes import ADVICE, Refused, attempt, said
from kvmpy.host.links import Link, LinkError, Links, Vf

VF_ADVICE: Final = ADVICE | {
    errno.EOPNOTSUPP: "the PF's driver cannot set it",
    errno.EINVAL: "the PF's driver does not take it",
    errno.EBUSY: "the PF is being reset; try again",
}


class VirtualFunctions:
    """What the machine has set at virtual functions, through their PFs."""

    def __init__(self, links: Links) -> None:
        self._links = links
        # As they were and as we wanted them, by the PF's index and their number.
        self._changed: dict[tuple[int, int], tuple[Vf, Vf]] = {}

    def change(self, interface: str, number: int, mac: str | None, vlan: int | None) -> dict[str, Any]:
        """Set what is given; returns what there was and what there is. Raises Refused, with everything as it was."""
        pf, before = self._find(interface, number)
        wanted = Vf(mac or before.mac, *((before.vlan, before.qos) if vlan is None else (vlan, 0)))
        if wanted != before:
            try:
                self._set(pf, number, before, wanted)
            except HostError:
                attempt(partial(self._set, pf, number, wanted, before))  # all of it: how far it came is not known
                raise
            first, _ = self._changed.get((pf.ifindex, number), (before, wanted))
            self._changed[pf.ifindex, number] = first, wanted
        return {"before": before._asdict(), "after": wanted._asdict()}

    def put_back(self, interface: str, number: int, **settings: Any) -> dict[str, Any]:
        """Make of one that is as in ``ours_...`` what it was, ``was_...``, and forget it; any other is left alone."""
        pf, now = self._find(interface, number)
        ours, was = (Vf(*(settings[f"{when}_{field}"] for field in Vf._fields)) for when in ("ours", "was"))
        self._changed.pop((pf.ifindex, number), None)
        if now == ours != was:
            self._set(pf, number, now, was)
            now = was
        return {"before": was._asdict(), "after": now._asdict()}

    def close(self) -> list[str]:
        """Put back what is still as we made it; returns what could not be."""
        steps = [partial(self._put_back, *place, ours, was) for place, (was, ours) in self._changed.items()]
        return [str(problem) for step in steps if (problem := attempt(step))]

    def _put_back(self, index: int, number: int, ours: Vf, was: Vf) -> None:
        pf = self._links.get(index)
        if pf and ours != was and self._links.vf(index, number) == ours:
            self._set(pf, number, ours, was)

    def _find(self, interface: str, number: int) -> tuple[Link, Vf]:
        try:
            pf = self._links.find(interface)
            function = self._links.vf(pf.ifindex, number) if pf else None
        except LinkError as e:
            raise Refused.by_kernel("host", interface, e) from e
        if pf is None or function is None:
            raise Refused("host", f"{interface}: has no virtual function {number} that it can set anything of")
        return pf, function

    def _set(self, pf: Link, number: int, before: Vf, wanted: Vf) -> None:
        place = f"{pf.name}: virtual function {number}"
        mac = wanted.mac if wanted.mac != before.mac else None
        vlan = wanted[1:] if wanted[1:] != before[1:] else None
        key = "mac" if mac else "vlan"
        try:
            self._links.change_vf(pf.ifindex, number, mac=mac, vlan=vlan)
        except LinkError as e:
            advice = VF_ADVICE.get(e.errno, "see dmesg")
            raise Refused(key, f"{place}: {said(wanted._asdict())}: {e}: {advice}") from e
        if (now := self._links.vf(pf.ifindex, number)) != wanted:
            raise Refused(key, f"{place}: is {now} after it was made {wanted}: who else configures it?")
