"""rtnetlink without a kernel: what ends a list of links, and how an answer that is none is told."""

from __future__ import annotations

import errno
import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvmpy.host.links import (
    HEADER,
    NLM_F_ACK_TLVS,
    NLMSG_DONE,
    NLMSG_ERROR,
    NLMSGERR_ATTR_MSG,
    LinkError,
    Links,
)
from kvmpy.host.netns import NetworkNamespace

WORDS = struct.pack("HH", 4 + 8, NLMSGERR_ATTR_MSG) + b"no more\0"


class Kernel:
    """A netlink socket: ``says`` answers every request, as (type, flags, what is behind the header)."""

    def __init__(self) -> None:
        self.says: list[tuple[int, int, bytes]] = []

    def setsockopt(self, *_: object) -> None: ...

    def bind(self, address: object) -> None: ...

    def settimeout(self, seconds: float) -> None: ...

    def send(self, request: bytes) -> None:
        self.sequence = HEADER.unpack_from(request)[3]

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        messages = [
            HEADER.pack(HEADER.size + len(data), kind, flags, self.sequence, 0) + data
            for kind, flags, data in self.says
        ]
        return b"".join(messages), (0, 0)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def links(kernel: Kernel) -> Links:
    namespace: Any = SimpleNamespace(socket=lambda *_: kernel)
    return Links(cast("NetworkNamespace", namespace))


@pytest.mark.parametrize("code", [b"", struct.pack("i", 0)], ids=["nothing", "zero"])
def test_a_list_of_links_ends_where_the_kernel_says_so(links: Links, kernel: Kernel, code: bytes) -> None:
    kernel.says = [(NLMSG_DONE, 0, code)]
    assert links.ports(3) == []


@pytest.mark.parametrize(
    ("flags", "words", "said"),
    [(0, b"", "EMSGSIZE"), (NLM_F_ACK_TLVS, WORDS, "EMSGSIZE: no more")],
    ids=["a number", "with words"],
)
def test_a_list_of_links_that_breaks_off_is_none(
    links: Links, kernel: Kernel, flags: int, words: bytes, said: str
) -> None:
    kernel.says = [(NLMSG_DONE, flags, struct.pack("i", -errno.EMSGSIZE) + words)]
    with pytest.raises(LinkError, match=f"^{said}$") as caught:
        links.ports(3)
    assert caught.value.errno == errno.EMSGSIZE


def test_a_refusal_repeats_our_header_before_the_kernels_words(links: Links, kernel: Kernel) -> None:
    kernel.says = [(NLMSG_ERROR, NLM_F_ACK_TLVS, struct.pack("i", -errno.EPERM) + bytes(HEADER.size) + WORDS)]
    with pytest.raises(LinkError, match=r"^EPERM: no more$"):
        links.delete(7)
