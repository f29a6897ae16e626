"""Placeholders, re-scan and the polars gate of the privacy tier."""

import json
from pathlib import Path

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_control.techdeck.model import CONVERSATION_SCHEMA, quarantine_frame, reject
from mcp_control.techdeck.validation import redact_quarantine, redact_text
from mcp_control.techdeck.validation.detectors import scan
from mcp_control.techdeck.validation.privacy import Redactor, gate, side_gate
from mcp_control.techdeck.validation.screen import Screened, screen
from tests.techdeck.conversations import frame

REGIONS = ("US", "GB")
PIECES = [
    "jane.doe@clinic.org", "JANE.DOE@clinic.org", "info@clinic.org", "https://facebook.com/jane", "https://nhs.uk/help",
    "415-555-0132", "(415) 555-0133", "4155550132", "1-800-273-8255", "988", "+44 7911 123456", "8.8.8.8", "192.168.1.1",
    "2001:4860:4860::8888", "4111 1111 1111 1111", "4111 1111 1111 1112", "GB82 WEST 1234 5698 7654 32", "123-45-6789",
    "123456789", "03/04/1985", "3 March 1985", "March 3", "born", "on", "DOB:", "birthday", "123 Maple Street", "12 Step Way",
    "PO Box 12", "my name is", "Jonas Weber", "Dr.", "Smith", "Dr", "Anna Berg, LMHC", "Thanks,\n", "call", "phone", "ssn",
    "order", "card", "version", "ip", "[EMAIL_1]", "[PHONE_7]", "[NAME_2]", "(", ")", ".", ",", "\n", "-", "x", "1", "0", "/",
    ":", "::", "é", "Straße", "٤", "ſep",
]  # fmt: skip
TEXTS = st.lists(
    st.tuples(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), st.sampled_from(["", " ", " ", " ", "\n"])),
    max_size=14,
).map(lambda pieces: "".join(piece + gap for piece, gap in pieces))


def redact(text: str) -> tuple[str, int]:
    """The text after the privacy tier, and the spans taken out."""
    redactor = Redactor(REGIONS, [text])
    clean = redactor.text(text)
    return clean, redactor.spans.total()


def test_the_same_datum_has_the_same_placeholder() -> None:
    """Acceptance 13: two spans of one address give one index."""
    assert redact("mail a.b@ex.org, again a.b@ex.org") == ("mail [EMAIL_1], again [EMAIL_1]", 2)
    assert redact("a.b@ex.org or A.B@EX.ORG or c@ex.org")[0] == "[EMAIL_1] or [EMAIL_1] or [EMAIL_2]"


def test_crisis_lines_stay_in_the_text() -> None:
    """Acceptance 14: nothing is changed and nothing is counted."""
    assert redact("call 988 or 1-800-273-8255") == ("call 988 or 1-800-273-8255", 0)


def test_card_and_iban_are_told_by_their_checksum() -> None:
    """Acceptance 15 and 16: one card, no card, one IBAN and nothing else in it."""
    assert redact("4111 1111 1111 1111") == ("[CARD_1]", 1)
    assert redact("4111 1111 1111 1112") == ("4111 1111 1111 1112", 0)
    assert redact("GB82 WEST 1234 5698 7654 32") == ("[IBAN_1]", 1)


def test_placeholders_of_the_input_are_not_given_out_again() -> None:
    """A text that was redacted before keeps its indexes; a new datum gets the next one."""
    assert redact("[EMAIL_3] wrote to a@b.org")[0] == "[EMAIL_3] wrote to [EMAIL_4]"


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_redaction_is_idempotent_and_leaves_nothing(text: str) -> None:
    """What redaction returns holds no accepted span, and redacting it again changes nothing."""
    clean, _ = redact(text)
    assert [span for span in scan(clean, regions=REGIONS) if span.accepted] == []
    assert redact(clean) == (clean, 0)


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_the_gate_lets_through_every_text_with_a_span(text: str) -> None:
    """Where a detector accepts a span, the polars gate is true: ungated rows need no scan."""
    if any(span.accepted for span in scan(text, regions=REGIONS)):
        assert gate(pl.Series([text])).to_list() == [True]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_screened_frame_holds_no_personal_data(conversations: list[list[str]]) -> None:
    """For any conversations the residual is 0, and a second screening finds and changes nothing."""
    data = frame([[("user", text) for text in turns] for turns in conversations]).with_row_index("at")
    first = screen(data, REGIONS, redact=True)
    assert first.frame["residual_pii"].sum() == 0
    again = screen(first.frame.select(data.columns), REGIONS, redact=True)
    assert again.spans.total() == 0
    assert again.frame.select(data.columns).equals(first.frame.select(data.columns))


def screened(row: dict[str, object], *, redact: bool = True) -> Screened:
    """One conversation after the tier; `row` replaces columns of a plain one."""
    plain = frame([[("user", "hello"), ("assistant", "hi")]]).to_dicts()[0]
    data = pl.DataFrame([{**plain, **row}], schema=CONVERSATION_SCHEMA).with_row_index("at")
    return screen(data, REGIONS, redact=redact)


def test_meta_is_redacted_by_its_values_with_the_key_as_context() -> None:
    """Numbers, nested texts and names under a name key are found; the JSON stays JSON; one index for one datum."""
    meta = {
        "phone": 4155550132,
        "count": 4155550132,
        "notes": ["mail a@b.org", {"again": "a@b.org\nThanks,\nJoy"}],
        "patient_name": "Anna Berg",
        "name": "assistant",
        "a@b.org": 1,
    }
    done = screened({"meta": json.dumps(meta), "id": "a@b.org-7"})
    (row,) = done.frame.to_dicts()
    assert json.loads(row["meta"]) == {
        "phone": "[PHONE_1]",
        "count": 4155550132,
        "notes": ["mail [EMAIL_1]", {"again": "[EMAIL_1]\nThanks,\n[NAME_1]"}],
        "patient_name": "[NAME_2]",
        "name": "assistant",
        "[EMAIL_1]": 1,
    }
    assert row["id"] == "[EMAIL_1]-7#0"
    assert (row["pii_spans"], row["pii_classes"], row["residual_pii"]) == (7, ["EMAIL", "PHONE", "NAME"], 0)


def test_names_of_speakers_and_labels_are_redacted() -> None:
    """A message's name is a name unless it is a role; label values are texts like any other."""
    messages = [
        {"role": "user", "content": "my name is Anna", "name": "Anna", "ts": None},
        {"role": "assistant", "content": "hi", "name": "Therapist", "ts": None},
    ]
    (row,) = screened({"messages": messages, "labels": [{"key": "contact", "value": "a@b.org"}]}).frame.to_dicts()
    assert [message["name"] for message in row["messages"]] == ["[NAME_1]", "Therapist"]
    assert row["messages"][0]["content"] == "my name is [NAME_1]"
    assert row["labels"] == [{"key": "contact", "value": "[EMAIL_1]"}]


def test_without_redaction_all_that_is_found_is_residual() -> None:
    """Redaction off: texts are untouched, spans counted, and the residual says so."""
    done = screened({"id": "a@b.org"}, redact=False)
    (row,) = done.frame.to_dicts()
    assert (row["id"], row["pii_spans"], row["residual_pii"]) == ("a@b.org", 1, 1)
    assert done.residual == {"EMAIL": 1}


def test_what_surrounds_the_messages_is_gated_too() -> None:
    """The gate of id, meta, labels and names is false for a plain row and true for each of them alone."""
    plain = frame([[("user", "hello")]]).to_dicts()[0]
    rows = [
        plain,
        {**plain, "id": "a@b.org"},
        {**plain, "meta": '{"name":"Anna"}'},
        {**plain, "meta": json.dumps({"text": "Thanks,\nJoy"})},
        {**plain, "labels": [{"key": "k", "value": "415-555-0132"}]},
        {**plain, "messages": [{"role": "user", "content": "x", "name": "Anna", "ts": None}]},
    ]
    assert side_gate(pl.DataFrame(rows, schema=CONVERSATION_SCHEMA)).to_list() == [False, *[True] * 5]


def test_quarantine_rows_are_redacted_and_keep_their_digest() -> None:
    """The raw record is shown without personal data, whole or cut; row, code and digest are as before."""
    raw = json.dumps({"text": "mail a@b.org", "phone": 4155550132}).encode()
    items = [reject(3, 90, "E_ROLE", "row 3", raw), reject(4, 99, "E_JSON", "row 4", b'{"text": "mail a@b.org')]
    before = quarantine_frame("a.jsonl", "ingestion", items)
    after = redact_quarantine(before)
    assert after["raw"].to_list() == ['{"phone":"[PHONE_1]","text":"mail [EMAIL_1]"}', '{"text": "mail [EMAIL_1]']
    assert after.drop("raw").equals(before.drop("raw"))


def test_a_sample_text_is_redacted_for_display() -> None:
    """One text alone, as a report would show it."""
    assert redact_text("Dr. Smith, call 415-555-0132") == "Dr. [NAME_1], call [PHONE_1]"


def test_no_placeholder_map_is_kept(tmp_path: Path) -> None:
    """Nothing that leaves the tier holds the original next to its placeholder."""
    done = screened({"messages": [{"role": "user", "content": "a.b@ex.org", "name": None, "ts": None}]})
    path = tmp_path / "all.json"
    path.write_text(done.frame.write_json() + str(done.spans) + str(done.low))
    assert "a.b@ex.org" not in path.read_text()
