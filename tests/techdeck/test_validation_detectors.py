"""Which places in a text are personal data, and which only look like it."""

import pytest

from mcp_control.techdeck.validation.detectors import CLASSES, scan


def found(text: str, before: str = "") -> list[tuple[str, str]]:
    """Class and text of every accepted span."""
    return [(span.kind, text[span.start : span.end]) for span in scan(text, before) if span.accepted]


@pytest.mark.parametrize(
    ("text", "kind", "span"),
    [
        ("Write to (jane.doe@clinic.org).", "EMAIL", "jane.doe@clinic.org"),
        ("JANE+x@Mail.CO.UK, please", "EMAIL", "JANE+x@Mail.CO.UK"),
        ("I am at https://facebook.com/jane.doe.", "URL", "https://facebook.com/jane.doe"),
        ("see https://forum.org/users/jane42?tab=1", "URL", "https://forum.org/users/jane42?tab=1"),
        ("go to https://a.org/?mail=jane@b.org now", "URL", "https://a.org/?mail=jane@b.org"),
        ("call (415) 555-0132.", "PHONE", "(415) 555-0132"),
        ("my number is +44 7911 123456", "PHONE", "+44 7911 123456"),
        ("ring 020 7946 0958 at night", "PHONE", "020 7946 0958"),
        ("my cell is 4155550132", "PHONE", "4155550132"),
        ("4155550132 is my cell", "PHONE", "4155550132"),
        ("my ip is 8.8.8.8", "IP", "8.8.8.8"),
        ("logged from 93.184.216.34.", "IP", "93.184.216.34"),
        ("host 2001:4860:4860::8888 answered", "IP", "2001:4860:4860::8888"),
        ("4111 1111 1111 1111", "CARD", "4111 1111 1111 1111"),
        ("amex 378282246310005", "CARD", "378282246310005"),
        ("pay to GB82 WEST 1234 5698 7654 32 THANK YOU", "IBAN", "GB82 WEST 1234 5698 7654 32"),
        ("DE89370400440532013000", "IBAN", "DE89370400440532013000"),
        ("it is 123-45-6789", "SSN", "123-45-6789"),
        ("social security 123456789", "SSN", "123456789"),
        ("I was born on 3 March 1985", "DOB", "3 March 1985"),
        ("DOB: 03/04/1985", "DOB", "03/04/1985"),
        ("my birthday is March 3rd", "DOB", "March 3rd"),
        ("1985-03-04 is my birthday", "DOB", "1985-03-04"),
        ("I live at 123 Maple Street, Apt 4", "ADDRESS", "123 Maple Street, Apt 4"),
        ("near 10 N. Elm Ave today", "ADDRESS", "10 N. Elm Ave"),
        ("write to P.O. Box 123", "ADDRESS", "P.O. Box 123"),
        ("My name is Jonas Weber. I cannot sleep.", "NAME", "Jonas Weber"),
        ("my name's Will and I worry", "NAME", "Will"),
        ("Dr. Smith said so", "NAME", "Smith"),
        ("It helps.\nKind regards,\nHope Miller", "NAME", "Hope Miller"),
        ("All the best. Anna Berg, LMHC", "NAME", "Anna Berg"),
    ],
)
def test_personal_data_is_found_with_its_exact_bounds(text: str, kind: str, span: str) -> None:
    """Each class is recognised, and the span neither cuts the datum nor takes its surroundings."""
    assert found(text) == [(kind, span)]


@pytest.mark.parametrize(
    "text",
    [
        "call 988 or 1-800-273-8255",
        "116 123, 111/911/999, text 741741",
        "the Texas Crisis Hotline 800-989-6884 is free",
        "order 4155550132",
        "10 30 2024",
        "take 50 mg 2 times, 100 mg at 10 30",
        "info@clinic.org or jane@example.com",
        "read https://www.nhs.uk/mental-health/depression?page=2.",
        "versions 1.2.3.4 and v10.2.3.44",
        "1.2.3.4",
        "192.168.1.1, 10.0.0.7, 127.0.0.1 and ::1",
        "std::vector and Bad::Face at 10:30:45",
        "4111 1111 1111 1112",
        "order number 4111111111111111",
        "1234 5678 9012 3452",
        "GB82 WEST 1234 5698 7654 33",
        "000-12-3456 666-12-3456 900-12-3456 123-00-4567 123-45-0000 078-05-1120",
        "reference 123456789",
        "since 2019 and on 03/04/2020",
        "born in 1985",
        "Session on 10/12/2024, my birthday party",
        "we buried our first born in Jan 13 years ago",
        "born 31/31/1985",
        "12 Step Way",
        "24 Hour Drive",
        "it is a 2 Way Street",
        "I am Sad",
        "I'm Muslim",
        "my name is mud",
        "My name is Not important",
        "Joy and Hope came with Grace; May I? Will you Mark it?",
        "The 5 Guided Steps helped",
    ],
)
def test_what_only_looks_personal_is_left_alone(text: str) -> None:
    """No trap of the detector list is accepted: crisis lines, versions, order numbers, dates of sessions, words as names."""
    assert found(text) == []


def test_a_known_line_keeps_its_place_but_is_not_accepted() -> None:
    """A crisis line is reported with a low score, so that no weaker class can take its digits."""
    (span,) = scan("call 988 or 1-800-273-8255")
    assert (span.kind, span.accepted) == ("PHONE", False)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("https://x.org/?m=jane@b.org", ["URL"]),
        ("GB82 WEST 1234 5698 7654 32", ["IBAN"]),
        ("4111-1111-1111-1111", ["CARD"]),
        ("my phone 123-45-6789", ["SSN"]),
        ("born 1985-03-04, call 415-555-0132", ["DOB", "PHONE"]),
        ("Dr. Elm is at 12 Oak Dr Springfield", ["NAME", "ADDRESS"]),
    ],
)
def test_the_stronger_class_wins_where_spans_overlap(text: str, kinds: list[str]) -> None:
    """URL > email > IBAN > card > SSN > IP > DOB > phone > address > name."""
    assert [kind for kind, _ in found(text)] == kinds
    assert CLASSES == ("URL", "EMAIL", "IBAN", "CARD", "SSN", "IP", "DOB", "PHONE", "ADDRESS", "NAME")


def test_several_numbers_in_a_row_are_told_apart() -> None:
    """Numbers that stand next to each other are each matched on their own digits."""
    assert [span for _, span in found("try 415-555-0133 415-555-0134")] == ["415-555-0133", "415-555-0134"]


def test_the_question_before_lends_a_bare_number_its_meaning() -> None:
    """Asked for a phone number, the digits of the answer are one."""
    assert found("4155550132") == []
    assert found("4155550132", before="What is your phone number?") == [("PHONE", "4155550132")]


def test_regions_decide_which_national_numbers_are_known() -> None:
    """A national number of a region that was not asked for is not matched; its international form is."""
    german = "ruf an: 030 901820"
    assert [span.kind for span in scan(german, regions=("DE",))] == ["PHONE"]
    assert scan(german, regions=("US",)) == []
    assert [span.kind for span in scan("ruf an: +49 30 901820", regions=("US",))] == ["PHONE"]
