"""Serial16550, mostly as Linux' 8250 driver sees it."""

from __future__ import annotations

from kvmpy.devices.serial import Serial16550, SerialState
from tests.fakes.driver8250 import FCR, IER, IIR, LCR, LSR, MCR, MSR, RX, SCR, TX, Driver8250
from tests.fakes.host import Line, Screen


def make(room_left: int | None = None) -> tuple[Serial16550, Driver8250, Line, Screen]:
    line, screen = Line(), Screen(room_left)
    com1 = Serial16550("com1", line, screen.take, room=screen.room)
    com1.resume()
    return com1, Driver8250(com1), line, screen


def opened(room_left: int | None = None) -> tuple[Serial16550, Driver8250, Line, Screen]:
    com1, driver, line, screen = make(room_left)
    driver.startup()
    return com1, driver, line, screen


def test_linux_autoconfig_finds_a_16550a() -> None:
    _, driver, _, screen = make()
    assert driver.autoconfig() == "16550A"
    assert screen.text == b""


def test_linux_autoconfig_leaves_the_divisor_and_no_interrupt() -> None:
    com1, driver, line, _ = make()
    driver.autoconfig()
    assert (com1.state.dll, com1.state.dlm) == (12, 0)
    assert line.changes == []


def test_fifo_holds_16_bytes_by_linux_measure() -> None:
    _, driver, _, _ = make()
    assert driver.size_fifo() == 16


def test_linux_finds_neither_the_thre_nor_the_txen_bug() -> None:
    _, driver, _, _ = make()
    assert driver.thre_test() == set()


def test_written_byte_reaches_the_sink_at_once() -> None:
    _, driver, _, screen = make()
    driver.outb(TX, ord("K"))
    assert screen.text == b"K"
    assert driver.inb(LSR) == 0x60


def test_reading_iir_acknowledges_the_thr_interrupt_and_lowers_the_line() -> None:
    _, driver, line, _ = opened()
    driver.outb(IER, 0x02)
    assert line.high()
    assert driver.inb(IIR) == 0xC2
    assert not line.high()
    assert driver.inb(IIR) == 0xC1


def test_reading_iir_keeps_the_thr_interrupt_while_it_reports_another() -> None:
    com1, driver, _, _ = opened()
    driver.outb(IER, 0x03)
    com1.receive(b"x")
    assert driver.inb(IIR) == 0xCC
    driver.inb(RX)
    assert driver.inb(IIR) == 0xC2


def test_each_sent_byte_raises_the_thr_interrupt_again() -> None:
    _, driver, line, _ = opened()
    driver.outb(IER, 0x02)
    driver.inb(IIR)
    driver.outb(TX, 1)
    assert line.high()
    assert driver.inb(IIR) == 0xC2


def test_line_stays_low_until_out2_is_set() -> None:
    _, driver, line, _ = make()
    driver.outb(IER, 0x02)
    assert not line.high()
    driver.outb(MCR, 0x08)
    assert line.high()


def test_loopback_disconnects_the_line() -> None:
    _, driver, line, _ = opened()
    driver.outb(IER, 0x02)
    driver.outb(MCR, 0x18)
    assert not line.high()


def test_interrupt_driven_sender_writes_everything_in_order() -> None:
    _, driver, line, screen = opened()
    pending = bytearray(range(200))
    driver.outb(IER, 0x07)
    driver.interrupt(pending)
    assert screen.text == bytes(range(200))
    assert not line.high()


def test_no_byte_is_lost_when_the_host_takes_seven_at_a_time() -> None:
    com1, driver, line, screen = opened(room_left=7)
    pending = bytearray(range(256))
    driver.outb(IER, 0x07)
    for _ in range(100):
        driver.interrupt(pending)
        screen.room_left = 7
        com1.drained()
    assert screen.text == bytes(range(256))
    assert not line.high()


def test_thr_is_not_empty_until_the_host_has_drained_it() -> None:
    com1, driver, line, screen = opened(room_left=0)
    driver.outb(IER, 0x02)
    driver.inb(IIR)
    driver.outb(TX, ord("a"))
    assert driver.inb(LSR) == 0x00
    assert not line.high()
    screen.room_left = None
    com1.drained()
    assert screen.text == b"a"
    assert driver.inb(LSR) == 0x60
    assert line.high()


def test_full_transmit_fifo_keeps_its_sixteen_bytes_and_drops_the_seventeenth() -> None:
    com1, driver, _, screen = opened(room_left=0)
    for value in range(17):
        driver.outb(TX, value)
    screen.room_left = None
    com1.drained()
    assert screen.text == bytes(range(16))


def test_clearing_the_transmit_fifo_discards_what_waits_and_says_empty() -> None:
    _, driver, _, screen = opened(room_left=0)
    driver.outb(TX, 1)
    driver.outb(FCR, 0x05)
    assert driver.inb(LSR) == 0x60
    assert screen.text == b""


def test_fifo_takes_sixteen_bytes_of_input_and_leaves_the_rest() -> None:
    com1, _, _, _ = opened()
    assert com1.receive(bytes(20)) == 16
    assert com1.receive(b"x") == 0


def test_without_fifo_one_byte_is_taken() -> None:
    com1, driver, _, _ = make()
    assert com1.receive(b"abc") == 1
    assert driver.inb(RX) == ord("a")


def test_room_is_offered_once_when_a_fifo_that_refused_is_empty_again() -> None:
    com1, driver, _, _ = opened()
    offers: list[str] = []
    com1.on_room = lambda: offers.append("room")
    com1.receive(bytes(17))
    for _ in range(15):
        driver.inb(RX)
    assert offers == []
    driver.inb(RX)
    driver.inb(RX)
    assert offers == ["room"]


def test_all_input_arrives_in_order_through_a_slow_guest() -> None:
    com1, driver, _, _ = opened()
    text = bytearray(range(256)) * 3
    offers: list[int] = []
    com1.on_room = lambda: offers.append(1)
    got = b""
    for _ in range(100):
        del text[: com1.receive(bytes(text))]
        got += driver.interrupt(bytearray())
    assert got == bytes(range(256)) * 3
    assert len(offers) == 47


def test_input_below_the_trigger_level_is_a_timeout_at_once() -> None:
    com1, driver, line, _ = opened()
    com1.receive(b"1234567")
    assert driver.inb(IIR) == 0xCC
    assert line.high()


def test_input_at_the_trigger_level_is_data() -> None:
    com1, driver, _, _ = opened()
    com1.receive(b"12345678")
    assert driver.inb(IIR) == 0xC4


def test_trigger_levels_are_1_4_8_and_14() -> None:
    com1, driver, _, _ = opened()
    seen = []
    for trigger in (0x01, 0x41, 0x81, 0xC1):
        driver.outb(FCR, trigger | 0x02)
        while driver.inb(IIR) != 0xC4:
            com1.receive(b"x")
        seen.append(len(com1.state.rx))
    assert seen == [1, 4, 8, 14]


def test_reading_all_input_lowers_the_line() -> None:
    com1, driver, line, _ = opened()
    com1.receive(b"ab")
    driver.inb(RX)
    assert line.high()
    driver.inb(RX)
    assert not line.high()


def test_switching_the_fifo_off_empties_it() -> None:
    com1, driver, _, _ = opened()
    com1.receive(b"abc")
    driver.outb(FCR, 0)
    assert driver.inb(LSR) & 0x01 == 0
    assert driver.inb(IIR) == 0x01


def test_loopback_returns_what_is_written_and_nothing_reaches_the_sink() -> None:
    _, driver, _, screen = opened()
    driver.outb(MCR, 0x10)
    driver.outb(TX, 0x5A)
    assert driver.inb(RX) == 0x5A
    assert screen.text == b""


def test_loopback_overrun_is_reported_once_with_the_highest_priority() -> None:
    _, driver, _, _ = opened()
    driver.outb(IER, 0x0F)
    driver.outb(MCR, 0x10)
    for value in range(17):
        driver.outb(TX, value)
    assert driver.inb(IIR) == 0xC6
    assert driver.inb(LSR) == 0x63
    assert driver.inb(LSR) == 0x61


def test_host_input_waits_while_loopback_is_on() -> None:
    com1, driver, _, _ = opened()
    offers: list[str] = []
    com1.on_room = lambda: offers.append("room")
    driver.outb(MCR, 0x10)
    assert com1.receive(b"x") == 0
    driver.outb(MCR, 0x0B)
    assert offers == ["room"]


def test_modem_lines_are_ready_without_a_modem() -> None:
    _, driver, _, _ = make()
    assert driver.inb(MSR) == 0xB0


def test_loopback_wires_each_output_to_its_input() -> None:
    _, driver, _, _ = make()
    seen = []
    for output in (0x11, 0x12, 0x14, 0x18):
        driver.outb(MCR, output)
        seen.append(driver.inb(MSR) & 0xF0)
    assert seen == [0x20, 0x10, 0x40, 0x80]


def test_modem_change_leaves_delta_bits_that_reading_clears() -> None:
    _, driver, _, _ = make()
    driver.outb(MCR, 0x10)
    assert driver.inb(MSR) == 0x0B
    assert driver.inb(MSR) == 0x00


def test_ring_indicator_leaves_a_delta_only_when_it_ends() -> None:
    _, driver, _, _ = make()
    driver.outb(MCR, 0x10)
    driver.inb(MSR)
    driver.outb(MCR, 0x14)
    assert driver.inb(MSR) == 0x40
    driver.outb(MCR, 0x10)
    assert driver.inb(MSR) == 0x04


def test_modem_interrupt_has_the_lowest_priority_and_goes_with_a_read_of_msr() -> None:
    _, driver, line, _ = opened()
    driver.outb(IER, 0x08)
    driver.outb(MCR, 0x18)
    driver.outb(MCR, 0x08)
    assert line.high()
    assert driver.inb(IIR) == 0xC0
    driver.inb(MSR)
    assert driver.inb(IIR) == 0xC1


def test_divisor_is_behind_dlab() -> None:
    com1, driver, _, screen = make()
    driver.outb(LCR, 0x83)
    driver.outb(0, 0x34)
    driver.outb(1, 0x12)
    assert (driver.inb(0), driver.inb(1)) == (0x34, 0x12)
    driver.outb(LCR, 0x03)
    assert driver.inb(IER) == 0
    assert (com1.state.dll, screen.text) == (0x34, b"")


def test_scratch_register_keeps_a_byte() -> None:
    _, driver, _, _ = make()
    driver.outb(SCR, 0xA5)
    assert driver.inb(SCR) == 0xA5


def test_reset_forgets_everything_and_lowers_the_line() -> None:
    com1, driver, line, _ = opened()
    com1.receive(b"abc")
    com1.reset()
    assert not line.high()
    assert driver.inb(LSR) == 0x60
    assert driver.inb(IIR) == 0x01


def test_loading_restores_the_line() -> None:
    com1, _, _, _ = opened()
    com1.receive(b"abc")
    other, _, line, _ = make()
    other.state = com1.state
    other.post_load()
    assert line.high()


def test_byte_written_after_room_is_back_does_not_overtake_those_that_wait() -> None:
    com1, driver, _, screen = opened(room_left=0)
    driver.outb(TX, ord("a"))
    screen.room_left = None
    driver.outb(TX, ord("b"))
    com1.drained()
    assert screen.text == b"ab"


def test_loaded_fifo_that_is_fuller_than_it_may_be_takes_nothing() -> None:
    com1, _, _, _ = make()
    com1.state = SerialState(rx=bytes(16))
    assert com1.receive(bytes(20)) == 0
    assert len(com1.state.rx) == 16


def test_what_waited_for_another_host_is_sent_once_the_guest_goes_on_here() -> None:
    source, driver, _, _ = opened(room_left=0)
    driver.outb(IER, 0x02)
    driver.outb(TX, ord("a"))
    com1, driver, line, screen = make()
    com1.pause()
    com1.state = source.state
    com1.post_load()
    assert driver.inb(LSR) == 0x00
    com1.resume()
    assert screen.text == b"a"
    assert driver.inb(LSR) == 0x60
    assert line.high()


def test_input_waits_with_the_host_until_the_guest_is_there() -> None:
    com1, driver, _, _ = make()
    com1.pause()
    offers: list[str] = []
    com1.on_room = lambda: offers.append("room")
    assert com1.receive(b"ab") == 0
    com1.reset()
    com1.state, com1.state.rx = SerialState(), b"c"
    com1.post_load()
    com1.resume()
    assert offers == []  # the other host's input comes first
    assert driver.inb(RX) == ord("c")
    assert offers == ["room"]
    assert com1.receive(b"ab") == 1


def test_input_that_came_while_it_was_paused_is_offered_when_it_goes_on() -> None:
    com1, _, _, _ = make()
    offers: list[str] = []
    com1.on_room = lambda: offers.append("room")
    com1.pause()
    assert com1.receive(b"a") == 0
    assert com1.state.rx == b""
    com1.resume()
    assert offers == ["room"]
