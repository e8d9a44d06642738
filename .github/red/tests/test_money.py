import pytest

from shop.money import percent, shown


@pytest.mark.parametrize(("cents", "rate", "expected"), [(1000, 10, 100), (1999, 10, 200), (5, 10, 1), (4, 10, 0)])
def test_a_share_is_rounded_half_up(cents, rate, expected):
    assert percent(cents, rate) == expected


@pytest.mark.parametrize(("cents", "text"), [(0, "0.00"), (5, "0.05"), (123456, "1,234.56")])
def test_an_amount_is_shown_as_people_write_it(cents, text):
    assert shown(cents) == text
