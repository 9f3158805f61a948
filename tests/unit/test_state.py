"""State: declared once, saved as plain values, loaded as hostile input."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.state import State, StateError, load, part, save, since, u8, u16, u32, u64


class Ring(State):
    NAME = "ring"
    gpa: u64 = 0
    size: u16 = 256
    event_idx: Annotated[bool, since(2)] = False


class Card(State):
    NAME = "card"
    VERSION = 2
    small: u8 = 0
    middle: u32 = 7
    large: u64 = 0
    on: bool = False
    data: bytes = b""
    ring: Ring = part(Ring)
    rings: tuple[Ring, ...] = ()
    gpas: list[u64] = []
    pair: tuple[u8, u64] = (0, 0)
    named: dict[str, u64] = {}
    maybe: u64 | None = None
    late: Annotated[u64, since(2)] = 5


def section(**changes: Any) -> dict[str, Any]:
    """What a power-on Card saves, with other values for some fields."""
    saved = save(Card())
    saved["state"].update(changes)
    return saved


def version_1() -> dict[str, Any]:
    saved = section()
    saved["version"] = 1
    del saved["state"]["late"], saved["state"]["ring"]["event_idx"]
    return saved


def refusal(section: object) -> str:
    with pytest.raises(StateError) as refused:
        load(Card, section)
    return str(refused.value)


def test_save_gives_plain_values_under_name_and_version() -> None:
    assert save(Ring(gpa=2**64 - 1)) == {
        "name": "ring",
        "version": 1,
        "state": {"gpa": 2**64 - 1, "size": 256, "event_idx": False},
    }


def test_bytes_travel_as_base64() -> None:
    assert save(Card(data=b"\xff\x00"))["state"]["data"] == "/wA="


def test_save_changes_nothing_and_shares_nothing() -> None:
    card = Card(gpas=[1])
    save(card)["state"]["gpas"].append(2)
    assert card == Card(gpas=[1])


def test_fresh_states_share_no_part() -> None:
    Card().ring.size = 1
    assert Card().ring.size == 256


@given(
    st.builds(
        Card,
        small=st.integers(0, 255),
        middle=st.integers(0, 2**32 - 1),
        large=st.integers(0, 2**64 - 1),
        on=st.booleans(),
        data=st.binary(),
        ring=st.builds(Ring, gpa=st.integers(0, 2**64 - 1)),
        gpas=st.lists(st.integers(0, 2**64 - 1)),
        maybe=st.none() | st.integers(0, 2**64 - 1),
    )
)
def test_every_state_survives_json(card: Card) -> None:
    assert load(Card, json.loads(json.dumps(save(card)))) == card


def test_older_version_gets_defaults_for_newer_fields() -> None:
    assert load(Card, version_1()) == Card()


def test_newer_field_does_not_belong_to_an_older_version() -> None:
    old = version_1()
    old["state"]["late"] = 1
    assert refusal(old) == "card.late: does not belong to version 1"


def test_newer_field_of_a_part_goes_by_the_outermost_version() -> None:
    old = version_1()
    old["state"]["ring"]["event_idx"] = True
    assert refusal(old) == "card.ring.event_idx: does not belong to version 1"


@pytest.mark.parametrize("version", [0, 3, -1, True, 1.0, "1", None, pytest.param(10**5000, id="huge"), [[]]])
def test_other_versions_are_refused(version: object) -> None:
    assert "is not one of 1 to 2" in refusal(section() | {"version": version})


@pytest.mark.parametrize("name", ["ring", "", None, 1, [[]], pytest.param("x" * 10**6, id="long")])
def test_section_of_another_device_is_refused(name: object) -> None:
    assert refusal(section() | {"name": name}).startswith("card: the section is named ")


@pytest.mark.parametrize("what", [None, 1, "x", [], {}, {"name": "card", "version": 2}, section() | {"more": 1}])
def test_section_has_exactly_three_keys(what: object) -> None:
    assert refusal(what) == "card: a section has exactly the keys name, version and state"


def test_missing_field_is_named() -> None:
    damaged = section()
    del damaged["state"]["ring"]["size"]
    assert refusal(damaged) == "card.ring.size: is missing"


def test_missing_field_is_named_in_a_list_of_parts() -> None:
    damaged = section(rings=[save(Ring())["state"], {}])
    assert refusal(damaged) == "card.rings[1].gpa: is missing"


@pytest.mark.parametrize(
    "key", ["more", pytest.param("\ud800", id="surrogate"), 1, None, pytest.param("x" * 10**6, id="long")]
)
def test_unknown_field_is_refused(key: Any) -> None:
    assert "is no field of it" in refusal(section() | {"state": section()["state"] | {key: 1}})


def test_unknown_field_of_a_part_is_refused() -> None:
    assert refusal(section(ring=save(Ring())["state"] | {"more": 1})) == "card.ring: 'more' is no field of it"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("small", True),
        ("small", 256),
        ("small", -1),
        ("small", 1.0),
        ("small", "1"),
        ("small", None),
        pytest.param("small", 10**5000, id="huge"),
        ("middle", 2**32),
        ("large", 2**64),
        ("large", -1),
        ("large", False),
        ("large", 1.0),
        ("on", 1),
        ("on", 0),
        ("data", "not base64!"),
        ("data", 1),
        ("data", [1]),
        ("ring", None),
        ("ring", []),
        ("rings", {}),
        ("rings", [1]),
        ("rings", [save(Ring(gpa=2**64))["state"]]),
        ("gpas", [2**64]),
        ("gpas", [True]),
        ("gpas", 1),
        ("pair", [256, 0]),
        ("pair", [0, 2**64]),
        ("pair", [0]),
        ("pair", [0, 0, 0]),
        ("named", {"a": 2**64}),
        ("named", {"a": -1}),
        ("maybe", 2**64),
        ("maybe", True),
        ("late", 2**64),
        ("late", True),
    ],
)
def test_wrong_value_is_refused_and_its_field_named(field: str, value: object) -> None:
    assert field in refusal(section(**{field: value}))


@pytest.mark.parametrize("field", [*save(Card())["state"], "name", "version", "state"])
def test_deep_nesting_is_refused_like_any_other_wrong_value(field: str) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    hostile = section() | {field: deep} if field in ("name", "version", "state") else section(**{field: deep})
    assert refusal(hostile)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["card", 1, 2]),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(list(section()["state"])) | st.text(), inner),
    )
)
def test_refusals_of_any_json_are_state_errors_and_short(state: Any) -> None:
    assert len(refusal({"name": "card", "version": 2, "state": state})) < 300


class Pairs(State):
    NAME = "pairs"
    pairs: tuple[tuple[u32, u64], ...] = ()
    runs: tuple[tuple[u64, ...], ...] = ()


def pairs(**changes: Any) -> dict[str, Any]:
    saved = save(Pairs())
    saved["state"].update(changes)
    return saved


def test_many_pairs_of_numbers_are_what_they_were() -> None:
    state = Pairs(pairs=tuple((index, 2**64 - 1 - index) for index in range(300)), runs=((2**64 - 1, 0), ()))
    assert load(Pairs, json.loads(json.dumps(save(state)))) == state


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ([1, 2**64], "pairs.pairs[300][1]: expected an integer from 0 to 2**64-1"),
        ([1, -1], "pairs.pairs[300][1]: expected an integer from 0 to 2**64-1"),
        ([1, True], "pairs: Expected `int`, got `bool` - at `$.pairs[300][1]`"),
        ([1, 1.0], "pairs.pairs[300][1]: expected"),
        ([1, "1"], "pairs.pairs[300][1]: expected"),
        ([2**32, 1], "pairs: Expected `int` <= 4294967295"),
        ([1], "pairs: Expected `array` of length 2"),
        ([1, 2, 3], "pairs: Expected `array` of length 2"),
        ({"1": 2}, "pairs: Expected `array`, got `object`"),
        ("ab", "pairs: Expected `array`, got `str`"),
        (None, "pairs: Expected `array`, got `null`"),
    ],
)
def test_one_bad_pair_among_many_is_refused_by_what_is_wrong_with_it(item: object, said: str) -> None:
    with pytest.raises(StateError) as refused:
        load(Pairs, pairs(pairs=[[1, 2]] * 300 + [item] + [[1, 2]] * 3))
    assert str(refused.value).startswith(said)


def test_each_number_of_a_run_is_looked_at() -> None:
    with pytest.raises(StateError, match=r"^pairs.runs\[1\]\[2\]: expected an integer"):
        load(Pairs, pairs(runs=[[1], [1, 2, 2**64]]))
