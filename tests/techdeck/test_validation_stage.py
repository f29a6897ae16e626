"""Stage 3 over partitions: verdicts, quarantine, additive statistics and equal bytes."""

from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import msgspec
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_control.techdeck.model import CONVERSATION_SCHEMA, QUARANTINE_SCHEMA, Options, ValidateOptions, write_parquet
from mcp_control.techdeck.validation import Validated, ValidationSummary, combine, validate
from mcp_control.techdeck.validation.combine import add
from mcp_control.techdeck.validation.lexicon import CATEGORIES
from mcp_control.techdeck.validation.stage import WARNINGS
from tests.techdeck.conversations import Turns, frame, quiet

LONG = "I have not slept well for many weeks and it is not getting any better."
PLAIN: Turns = [("user", LONG), ("assistant", "That sounds hard. What do you think about in the night?")]
FIELDS = [
    "verdict", "warnings", "same_role_pairs", "adjacent_pairs", "content_ok", "too_long", "language", "language_turns",
    "same_language_turns", "pii_spans", "pii_classes", "pii_low", "residual_pii", "sentences", "bias",
]  # fmt: skip


def run(data: pl.DataFrame, folder: Path, options: Options | None = None) -> Validated:
    """Stage 3 over one frame."""
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(data, folder / "in.parquet")
    return validate(folder / "in.parquet", folder / "out", options or Options(), quiet)


def checks(conversations: list[Turns], folder: Path, **settings: object) -> list[dict[str, object]]:
    """The `validation` struct of each kept conversation."""
    done = run(frame(conversations), folder, Options(validate=msgspec.convert(settings, ValidateOptions)))
    assert done.conversations is not None
    kept = pl.read_parquet(done.conversations)
    return [dict(row) for row in kept["validation"].to_list()]


def test_a_plain_conversation_passes_with_all_fields(tmp_path: Path) -> None:
    """Acceptance 1: no warning; the struct has its documented fields in order, the other columns are unchanged."""
    data = frame([PLAIN])
    done = run(data, tmp_path)
    assert done.conversations is not None
    kept = pl.read_parquet(done.conversations)
    assert kept.columns == [*CONVERSATION_SCHEMA.names(), "validation"]
    assert kept.drop("validation").equals(data)
    (check,) = kept["validation"].to_list()
    assert list(check) == FIELDS
    assert list(check["bias"]) == list(CATEGORIES)
    assert (check["verdict"], check["warnings"], check["language"], check["sentences"]) == ("ok", [], "en", 3)


def test_same_role_neighbours_are_kept_and_counted(tmp_path: Path) -> None:
    """Acceptance 12: user, user, assistant is kept with a warning; alternation is 1 - 1/2."""
    conversation: Turns = [("system", "Be kind."), ("user", "a"), ("user", "b"), ("assistant", "c")]
    done = run(frame([conversation]), tmp_path)
    assert (done.rows_out, done.rejected) == (1, 0)
    assert combine([done.stats]).alternation == 0.5
    (check,) = checks([conversation], tmp_path / "again")
    assert (check["same_role_pairs"], check["adjacent_pairs"], check["warnings"]) == (1, 2, ["W_ALTERNATION"])


def test_tool_results_in_a_row_are_no_fault(tmp_path: Path) -> None:
    """Two tool messages after each other answer two calls."""
    (check,) = checks([[("user", "a"), ("tool", "1"), ("tool", "2"), ("assistant", "b")]], tmp_path)
    assert (check["same_role_pairs"], check["adjacent_pairs"]) == (0, 3)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("naïve café, “quotes” — and NÃO", True),
        ("tab\tand\nline", True),
        ("broken \ufffd here", False),
        ("bell \x07", False),
        ("next \x85 line", False),
        ("<|im_start|>user", False),
        ("[INST] do [/INST]", False),
        ("itâ€™s cafÃ©", False),
    ],
)
def test_broken_text_is_told_from_unusual_text(text: str, clean: bool, tmp_path: Path) -> None:
    """Replacement and control characters, chat tags and mis-decoded text are broken; accents and quotes are not."""
    (check,) = checks([[("user", text), ("assistant", "ok")]], tmp_path)
    assert check["content_ok"] is clean
    assert check["warnings"] == ([] if clean else ["W_CONTENT"])


def test_length_language_and_derogation_warn(tmp_path: Path) -> None:
    """Each finding of a row has its code, in the fixed order."""
    (check,) = checks(
        [[("user", LONG), ("assistant", "Poor people are just lazy.")]], tmp_path, max_turn_chars=30, languages=["de"]
    )
    assert check["warnings"] == ["W_TOO_LONG", "W_LANGUAGE", "W_DEROGATION"]
    assert check["too_long"] == 1
    assert set(check["warnings"]) <= set(WARNINGS)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (LONG, "en"),
        ("Hola, estoy muy triste y no puedo dormir por las noches.", "es"),
        ("Je suis très triste et je ne peux pas dormir.", "fr"),
        ("Ich bin sehr traurig und ich kann nicht schlafen.", "de"),
        ("Мне очень грустно, и я не могу спать по ночам.", "ru"),
        ("私はとても悲しいです。眠れません。", "ja"),
        ("ok", None),
        ("haha ok thx", None),
    ],
)
def test_the_language_of_a_turn_is_guessed_or_left_open(text: str, code: str | None, tmp_path: Path) -> None:
    """Function words or the script decide; too little text gives null."""
    (check,) = checks([[("user", text), ("assistant", text)]], tmp_path)
    assert check["language"] == code
    assert check["same_language_turns"] == check["language_turns"] == (2 if code else 0)


def test_turns_in_another_language_are_counted(tmp_path: Path) -> None:
    """The share of turns in the conversation's own language sees an answer in another one."""
    (check,) = checks(
        [[("user", LONG), ("assistant", "Ich bin für dich da und höre dir zu."), ("user", LONG)]], tmp_path
    )
    assert (check["language"], check["language_turns"], check["same_language_turns"]) == ("en", 3, 2)


def test_unusable_rows_go_to_quarantine_redacted(tmp_path: Path) -> None:
    """Blank content, missing sides and unknown roles: right code, row and digest; no personal data in what is shown."""
    conversations: list[Turns] = [
        PLAIN,
        [("user", " \n"), ("assistant", "mail a@b.org")],
        [("user", "I am alone: 415-555-0132")],
        [("assistant", "hello")],
        [],
        [("user", "x"), ("wizard", "y"), ("assistant", "z")],
        [("system", ""), ("user", "x"), ("assistant", "y")],
    ]
    done = run(frame(conversations), tmp_path)
    assert (done.rows_in, done.rows_out, done.rejected) == (7, 2, 5)
    assert done.rejected_by_code == {"E_EMPTY_CONTENT": 1, "E_NO_MESSAGES": 3, "E_ROLE": 1}
    assert done.quarantine is not None
    bad = pl.read_parquet(done.quarantine)
    assert bad.schema == QUARANTINE_SCHEMA
    assert list(zip(bad["row"], bad["code"], strict=True)) == [
        (1, "E_EMPTY_CONTENT"), (2, "E_NO_MESSAGES"), (3, "E_NO_MESSAGES"), (4, "E_NO_MESSAGES"), (5, "E_ROLE"),
    ]  # fmt: skip
    assert bad["stage"].unique().to_list() == ["validation"]
    assert bad["file"].unique().to_list() == ["a.jsonl"]
    shown = "\n".join(bad["raw"])
    assert "a@b.org" not in shown
    assert "415-555-0132" not in shown
    assert "[EMAIL_1]" in shown
    assert all(len(digest) == 64 for digest in bad["sha256"])
    summary = combine([done.stats])
    assert summary.structure_valid == 2 / 6  # the blank row stays out
    assert [finding.code for finding in summary.findings if finding.severity == "error"] == ["V_STRUCTURE"]


def test_redaction_changes_only_what_is_personal(tmp_path: Path) -> None:
    """Acceptance 13 and 14 in a conversation: placeholders, spans, classes; a crisis line stays."""
    conversation: Turns = [
        ("user", "mail a.b@ex.org, again a.b@ex.org"),
        ("assistant", "call 988 or 1-800-273-8255, or c@ex.org"),
    ]
    done = run(frame([conversation]), tmp_path)
    assert done.conversations is not None
    (row,) = pl.read_parquet(done.conversations).to_dicts()
    assert [message["content"] for message in row["messages"]] == [
        "mail [EMAIL_1], again [EMAIL_1]",
        "call 988 or 1-800-273-8255, or [EMAIL_2]",
    ]
    check = row["validation"]
    assert (check["pii_spans"], check["pii_classes"], check["pii_low"], check["residual_pii"]) == (3, ["EMAIL"], 1, 0)
    summary = combine([done.stats])
    assert (summary.pii_rate, summary.privacy, summary.residual_rows) == (1.0, 1.0, 0)
    (look_alikes,) = [finding for finding in summary.findings if finding.code == "V_LOOKALIKES"]
    assert (look_alikes.value, look_alikes.rows) == (sum(summary.pii_low.values()), None)  # places, not rows


def test_without_redaction_the_residual_fails_the_privacy_gate(tmp_path: Path) -> None:
    """Redaction off: the text stays, every row with personal data is residual and an error is found."""
    done = run(
        frame([[("user", "mail a.b@ex.org"), ("assistant", "ok")], PLAIN]),
        tmp_path,
        Options(validate=ValidateOptions(redact=False)),
    )
    summary = combine([done.stats])
    assert (summary.residual_rows, summary.privacy) == (1, 0.5)
    assert "V_RESIDUAL_PII" in [finding.code for finding in summary.findings]


def test_nothing_in_gives_null_scores(tmp_path: Path) -> None:
    """An empty partition writes nothing; a denominator of 0 is "not assessed", never 1."""
    done = run(frame([]), tmp_path)
    assert (done.conversations, done.quarantine, done.rows_in) == (None, None, 0)
    for summary in (combine([done.stats]), combine([])):
        assert (summary.structure_valid, summary.alternation, summary.content_ok) == (None, None, None)
        assert (summary.pii_rate, summary.privacy, summary.bias) == (None, None, None)
        assert summary.findings == []


def test_all_rows_rejected_writes_only_the_quarantine(tmp_path: Path) -> None:
    """No row kept: no conversations file."""
    done = run(frame([[("user", "")]]), tmp_path)
    assert done.conversations is None
    assert done.quarantine is not None


SAMPLES: list[Turns] = [
    PLAIN,
    [("user", "a"), ("user", "b"), ("assistant", "c")],
    [("user", ""), ("assistant", "x")],
    [("user", "only me")],
    [
        ("user", "mail a@b.org or call 415-555-0132 or 988"),
        ("assistant", "Poor people are just lazy. The women were kind."),
    ],
    [("user", "Women are too emotional."), ("assistant", "A nurse and two men came; the women were awful.")],
    [("user", "cafÃ© \ufffd"), ("assistant", "Ich bin für dich da und höre dir zu.")],
    [("user", "As a gay Muslim man I feel torn."), ("assistant", "Men are welcome here. The man was a great doctor.")],
]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(range(len(SAMPLES))), min_size=1, max_size=12),
    st.lists(st.integers(0, 12), max_size=4),
    st.randoms(use_true_random=False),
)
def test_any_partitioning_gives_the_same_summary(picks: list[int], cuts: list[int], order: Random) -> None:
    """Statistics of parts, in any order, add up to those of the whole; so does the summary, to the last bit."""
    data = frame([SAMPLES[pick] for pick in picks])
    bounds = sorted({0, data.height, *(cut for cut in cuts if cut < data.height)})
    with TemporaryDirectory() as name:
        folder = Path(name)
        whole = run(data, folder / "whole")
        parts = [run(data.slice(begin, end - begin), folder / f"part-{begin}") for begin, end in pairwise(bounds)]
        rows = [pl.read_parquet(part.conversations) for part in parts if part.conversations is not None]
        if whole.conversations is not None:
            assert pl.concat(rows).equals(pl.read_parquet(whole.conversations))
    stats = [part.stats for part in parts]
    order.shuffle(stats)
    assert add(stats) == add([whole.stats])
    assert msgspec.json.encode(combine(stats)) == msgspec.json.encode(combine([whole.stats]))


def test_statistics_survive_json(tmp_path: Path) -> None:
    """Statistics travel as a task's result: what comes back gives the same summary, and it is small."""
    done = run(frame(SAMPLES), tmp_path)
    text = msgspec.json.encode(done.stats)
    assert combine([msgspec.json.decode(text)]) == combine([done.stats])
    assert msgspec.json.decode(msgspec.json.encode(combine([done.stats])), type=ValidationSummary) == combine(
        [done.stats]
    )
    assert len(text) < 10_000


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    """Two runs write the same files to the byte."""
    first, second = run(frame(SAMPLES), tmp_path / "a"), run(frame(SAMPLES), tmp_path / "b")
    for one, other in ((first.conversations, second.conversations), (first.quarantine, second.quarantine)):
        assert one is not None
        assert other is not None
        assert one.read_bytes() == other.read_bytes()


def test_progress_reaches_the_number_of_rows(tmp_path: Path) -> None:
    """Progress never goes back and ends at all rows."""
    write_parquet(frame(SAMPLES), tmp_path / "in.parquet")
    seen: list[int] = []
    validate(tmp_path / "in.parquet", tmp_path / "out", Options(), lambda done, total, message: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == len(SAMPLES)
