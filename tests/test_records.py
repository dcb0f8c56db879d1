"""Records that carry a digest of their values."""

import json
from typing import Any

import pytest

from nndefense.files import DIGEST, digest_of, json_text, sealed, unsealed

RECORD: dict[str, Any] = {
    "format": "f", "version": 1, "names": ("a", "\u00e9", "\udc80"), "counts": {10: 1, 9: 2}, "share": 0.1,
    "zero": -0.0, "nothing": None, "deep": {"list": [{"x": 1}, []], "flag": True}, "long": 10**40,
}  # fmt: skip


def test_a_sealed_record_comes_back_without_its_digest_as_json_holds_it() -> None:
    stored = sealed(RECORD)
    again, had = unsealed(json.loads(json_text(stored)))
    assert had
    assert again == json.loads(json_text(RECORD))
    assert list(stored) == [*RECORD, DIGEST]
    assert sealed(stored) == stored
    assert unsealed(stored)[1]


def test_order_and_spaces_are_harmless_and_values_and_types_are_not() -> None:
    turned = dict(reversed(list(sealed(RECORD).items())))
    assert unsealed(json.loads(json.dumps(turned, indent=7)))[1]
    assert len({digest_of(value) for value in (1, 1.0, True, "1", [1], {"1": 1}, None, 0, -0.0, 0.0, "")}) == 11


def test_every_flipped_bit_of_a_sealed_record_is_refused_or_changes_no_value() -> None:
    whole = json_text(sealed(RECORD)).encode()
    values = unsealed(json.loads(whole))[0]
    refused = 0
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        try:
            found, had = unsealed(json.loads(bytes(data).decode()))
        except ValueError:
            refused += 1
            continue
        # Where the digest's own name has changed, the record reads as one of an older version with an unknown entry.
        assert found == values if had else set(found) - set(values)
    assert refused > 7 * len(whole)


@pytest.mark.parametrize(
    "damage", [{DIGEST: ""}, {DIGEST: None}, {"share": 0.2}, {"new": 1}, {"names": ["a", "\u00e9"]}]
)
def test_what_was_changed_by_hand_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="changed since it was written"):
        unsealed({**sealed(RECORD), **damage})
    with pytest.raises(ValueError, match="changed since it was written"):
        unsealed({name: value for name, value in sealed(RECORD).items() if name != "share"})


def test_records_of_older_versions_have_no_digest_and_other_values_are_no_records() -> None:
    assert unsealed({"a": 1}) == ({"a": 1}, False)
    for value in ([], "text", 3, None):
        with pytest.raises(ValueError, match="not a record"):
            unsealed(value)
