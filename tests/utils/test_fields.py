from __future__ import annotations

import pytest

from e2vpt_peft.utils.fields import (
    check_choice,
    check_integer,
    check_module_names,
    check_positive,
    check_probability,
    check_type,
    is_number,
)

CASES = [
    (lambda: check_integer("n", 0, at_least=1), ValueError, "n=0 must be 1 or more."),
    (lambda: check_integer("n", 2.0, at_least=1), TypeError, "n=2.0 must be an integer, 1 or more."),
    (lambda: check_integer("n", True, at_least=0), TypeError, "n=True must be an integer, 0 or more."),
    (lambda: check_integer("n", None, at_least=0), TypeError, "n=None must be an integer, 0 or more."),
    (lambda: check_positive("p", "1"), TypeError, "p='1' must be a number, above 0."),
    (lambda: check_positive("p", True, or_zero=True), TypeError, "p=True must be a number, 0 or more."),
    (lambda: check_positive("p", 0), ValueError, "p=0 must be above 0, and finite."),
    (lambda: check_positive("p", float("inf")), ValueError, "p=inf must be above 0, and finite."),
    (lambda: check_positive("p", float("nan")), ValueError, "p=nan must be above 0, and finite."),
    (lambda: check_positive("p", -1e-9, or_zero=True), ValueError, "p=-1e-09 must be 0 or more, and finite."),
    (lambda: check_probability("p", "0.1"), TypeError, "p='0.1' must be a number in [0, 1)."),
    (lambda: check_probability("p", True), TypeError, "p=True must be a number in [0, 1)."),
    (lambda: check_probability("p", 1), ValueError, "p=1 must be in [0, 1): "),
    (lambda: check_probability("p", -1e-9), ValueError, "p=-1e-09 must be in [0, 1): "),
    (lambda: check_probability("p", float("nan")), ValueError, "p=nan must be in [0, 1): "),
    (lambda: check_type("t", 3, str, "a string"), TypeError, "t=3 must be a string."),
    (lambda: check_type("t", None, str, "a string"), TypeError, "t=None must be a string."),
    (lambda: check_type("t", 3, str, "a string", optional=True), TypeError, "t=3 must be a string or None."),
    (lambda: check_choice("c", "x", ("a", "b")), ValueError, "c='x' must be 'a' or 'b'."),
    (lambda: check_choice("c", None, ("a", "b", "d")), ValueError, "c=None must be one of 'a', 'b', 'd'."),
    (lambda: check_module_names("m", "head"), TypeError, "m='head' must be a list of names, or None."),
    (lambda: check_module_names("m", ["a", ""]), TypeError, "m=['a', ''] must be a list of names, or None."),
    (lambda: check_module_names("m", [1]), TypeError, "m=[1] must be a list of names, or None."),
    (lambda: check_module_names("m", 1, or_pattern=True), TypeError, "m=1 must be a list of names, or a regular exp"),
    (lambda: check_module_names("m", "(a", or_pattern=True), ValueError, "m='(a' is no regular expression: missing )"),
]


@pytest.mark.parametrize(("check", "error", "words"), CASES)
def test_an_error_names_the_field_its_value_and_what_is_allowed(check, error, words):
    with pytest.raises(error) as raised:
        check()
    assert str(raised.value).startswith(words)


def test_what_is_allowed_passes():
    check_integer("n", 1, at_least=1)
    check_integer("n", None, at_least=1, optional=True)
    check_positive("p", 1e-9)
    check_positive("p", 0, or_zero=True)
    check_probability("p", 0)
    check_probability("p", 0.999)
    check_type("t", "a", str, "a string")
    check_type("t", None, str, "a string", optional=True)
    check_choice("c", "b", ("a", "b"))
    for names in (None, [], ["a"], ("a", "b"), {"a"}):
        check_module_names("m", names)
    check_module_names("m", r".*\.attention", or_pattern=True)


@pytest.mark.parametrize(("value", "expected"), [(1, True), (0.5, True), (True, False), ("1", False), (None, False)])
def test_truth_values_are_no_numbers(value, expected):
    assert is_number(value) is expected
