"""docs/requirements.md says which test proves what, and is made of the tests' names."""

from __future__ import annotations

from pathlib import Path

from scripts import requirements
from scripts.requirements import Proof, Requirement


def test_the_page_is_up_to_date() -> None:
    assert requirements.PAGE.read_text() == requirements.page(), "run `make docs`"


def test_there_is_a_text_for_each_number_and_for_each_that_a_test_claims() -> None:
    known = requirements.requirements()
    assert list(known) == list(range(1, 55))
    assert {each.needs for each in known.values()} == {"unit", "guest", "function"}
    assert requirements.proofs().keys() <= known.keys()


def test_a_name_may_have_several_numbers_and_only_at_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/test_x.py").write_text("def test_r9_r10_a_b():\n    pass\n\ndef test_of_r11_c():\n    pass\n")
    (tmp_path / "test_y.py").write_text(
        "class TestIt:\n    def test_r9_d(self):\n        pass\n\ndef r12_e():\n    pass\n"
    )
    first = Proof("lab/test_x.py", "a b")
    assert requirements.proofs(tmp_path) == {9: [first, Proof("test_y.py", "d")], 10: [first]}


def test_what_nothing_proves_and_what_no_guest_has_seen_is_said() -> None:
    known = {number: Requirement("part", "guest", f"text {number}") for number in (1, 2, 3)}
    proven = {2: [Proof("unit/test_x.py", "it works")], 3: [Proof("lab/test_x.py", "it works there")]}
    said = "\n".join(requirements.summary(known, proven))
    assert "**2 of 3** are proven, by 2 tests" in said
    assert "Nothing proves yet: [R1](#r1)." in said
    assert "without one so far: [R2](#r2)." in said
    assert "- *nothing proves it yet*" in requirements.section(1, known[1], [])
