"""Conversation formats: recognised by shape, mapped by rule, refused with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.techdeck.formats.mapping import RULES, clean, prepare
from mcp_control.techdeck.formats.recognise import recognise
from mcp_control.techdeck.model import DataError
from tests.techdeck.stages import Outcome, run


def records(tmp_path: Path, *items: Any, **options: Any) -> Outcome:
    """Stages 1 and 2 over JSON lines of `items`."""
    return run("\n".join(json.dumps(item) for item in items).encode(), tmp_path, **options)


def chat(*pairs: tuple[str, Any], **more: Any) -> dict[str, Any]:
    """A record with `messages`."""
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **more}


U, A, S = "user", "assistant", "system"
HI = chat((U, "Hi"), (A, "Hello"))


def test_case_1_messages(tmp_path: Path) -> None:
    """Case 1: role and content under messages is chatml, without flags."""
    outcome = records(tmp_path, HI)
    assert outcome.format == "chatml"
    assert outcome.turns() == [(U, "Hi"), (A, "Hello")]
    assert outcome.conversations[0]["flags"] == []
    assert outcome.conversations[0]["source"] | {"sha256": ""} == {
        "file": "input.jsonl",
        "sha256": "",
        "row": 0,
        "byte_offset": 0,
        "format": "chatml",
        "encoding": "utf-8",
        "role_confidence": 1.0,
    }


@pytest.mark.parametrize("speaker", ["gpt", "assistant"])
def test_cases_2_and_3_sharegpt(speaker: str, tmp_path: Path) -> None:
    """Cases 2 and 3: from and value under conversations is sharegpt, whichever name the assistant has."""
    outcome = records(tmp_path, {"conversations": [{"from": "human", "value": "a"}, {"from": speaker, "value": "b"}]})
    assert outcome.format == "sharegpt"
    assert outcome.turns() == [(U, "a"), (A, "b")]
    assert outcome.quarantine == []


def test_case_4_messages_under_conversations(tmp_path: Path) -> None:
    """Case 4: role and content under conversations is chatml."""
    outcome = records(
        tmp_path, {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    assert outcome.format == "chatml"
    assert outcome.turns() == [(U, "a"), (A, "b")]


@pytest.mark.parametrize(("extra", "question"), [("1 2", "Sum\n\n1 2"), ("", "Sum"), (None, "Sum")])
def test_cases_5_and_6_alpaca(extra: str | None, question: str, tmp_path: Path) -> None:
    """Cases 5 and 6: a non-blank input joins the instruction by a blank line, a blank one leaves no trace."""
    outcome = records(tmp_path, {"instruction": "Sum", "input": extra, "output": "3"})
    assert outcome.format == "alpaca"
    assert outcome.turns() == [(U, question), (A, "3")]


def test_case_7_context_and_response_columns(tmp_path: Path) -> None:
    """Case 7: a CSV with Context and Response is a question and an answer."""
    outcome = run(b"Context,Response\nI feel low,Tell me more\n", tmp_path, "data.csv")
    assert outcome.format == "qa"
    assert outcome.turns() == [(U, "I feel low"), (A, "Tell me more")]


@pytest.mark.parametrize("wrap", [True, False])
def test_case_8_transcript(wrap: bool, tmp_path: Path) -> None:
    """Case 8: labels split at line starts only, in a text field and in a plain text file."""
    text = "Human: a\nAssistant: b: c\nHuman: d"
    outcome = records(tmp_path, {"text": text}) if wrap else run(text.encode(), tmp_path, "talk.txt")
    assert outcome.format == "transcript"
    assert outcome.turns() == [(U, "a"), (A, "b: c"), (U, "d")]


@pytest.mark.parametrize("wrap", [True, False])
def test_case_9_one_label_within_a_sentence(wrap: bool, tmp_path: Path) -> None:
    """Case 9: a label inside a sentence makes no conversation; the error names keys and known signatures."""
    text = "My assistant: great"
    with pytest.raises(DataError) as caught:
        records(tmp_path, {"text": text}) if wrap else run(text.encode(), tmp_path, "talk.txt")
    assert caught.value.code == "E_FORMAT_UNKNOWN"
    assert caught.value.detail.startswith("keys {text}; known signatures: {messages[role,content]")
    assert "great" not in caught.value.detail


def test_case_10_personachat(tmp_path: Path) -> None:
    """Case 10: the last utterance and its last candidate make one conversation; personality is the system message."""
    outcome = records(
        tmp_path,
        {
            "personality": ["p."],
            "utterances": [
                {"history": ["a"], "candidates": ["y", "b"]},
                {"history": ["a", "b", "c"], "candidates": ["x", "d"]},
            ],
        },
    )
    assert outcome.format == "personachat"
    assert [outcome.turns(index) for index in range(len(outcome.conversations))] == [
        [(S, "p."), (U, "a"), (A, "b"), (U, "c"), (A, "d")]
    ]


def test_case_11_unknown_role(tmp_path: Path) -> None:
    """Case 11: an unknown role sets its row aside with row and message index; the others stay."""
    outcome = records(tmp_path, HI, chat((U, "a"), ("wizard", "b")), HI)
    assert [item["source"]["row"] for item in outcome.conversations] == [0, 2]
    (row,) = outcome.quarantine
    assert (row["row"], row["stage"], row["code"]) == (1, "standardization", "E_ROLE")
    assert row["message"] == "row 1, message 1: unknown role wizard"


def test_case_12_two_turns_of_one_role(tmp_path: Path) -> None:
    """Case 12: neighbours of the same role are kept as they are."""
    assert records(tmp_path, chat((U, "a"), (U, "b"), (A, "c"))).turns() == [(U, "a"), (U, "b"), (A, "c")]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, U) for name in ("human", "usr", "prompter", "patient", "client", "seeker", "User")),
        *((name, A) for name in ("gpt", "bot", "model", "chatgpt", "bard", "therapist", "counselor", "supporter")),
        ("developer", S),
        *((name, "tool") for name in ("tool", "function", "observation")),
    ],
)
def test_role_names(name: str, role: str, tmp_path: Path) -> None:
    """Every known role name maps to its canonical role."""
    assert records(tmp_path, chat((U, "a"), (A, "b"), (name, "c"))).turns()[2] == (role, "c")


FORMATS: list[tuple[str, Any, list[tuple[str, str]]]] = [
    ("turns", ["a", "b", "c"], [(U, "a"), (A, "b"), (U, "c")]),
    ("turns", {"dialog": ["a", "b"]}, [(U, "a"), (A, "b")]),
    (
        "turns",
        {"dialogue": [{"speaker": "client", "text": "a"}, {"speaker": "therapist", "text": "b"}]},
        [(U, "a"), (A, "b")],
    ),
    ("turns", {"turns": [{"speaker": "Ann", "text": "a"}, {"speaker": "Bo", "text": "b"}]}, [(U, "a"), (A, "b")]),
    ("turns", {"history": [["q", "a"], ["q2", "a2"]]}, [(U, "q"), (A, "a"), (U, "q2"), (A, "a2")]),
    (
        "alpaca",
        {"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]},
        [(S, "s"), (U, "q"), (A, "a"), (U, "i"), (A, "o")],
    ),
    ("qa", {"input": "q", "output": "a"}, [(U, "q"), (A, "a")]),
    ("qa", {"Question Text": "q", "answer_text": "a"}, [(U, "q"), (A, "a")]),
    ("qa", {"question": "q", "context": "c", "answer": "a"}, [(S, "c"), (U, "q"), (A, "a")]),
    (
        "chatml",
        {"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": []},
        [(U, "q"), (A, "a")],
    ),
    ("qa", {"prompt": "q", "chosen": "a", "rejected": "b"}, [(U, "q"), (A, "a")]),
    ("transcript", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "x"}, [(U, "q"), (A, "a")]),
    (
        "chatml_text",
        {"text": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na"},
        [(S, "s"), (U, "q"), (A, "a")],
    ),
    ("transcript", {"talk": "Intake.\nQ: q\nmore\nA: a"}, [(S, "Intake."), (U, "q\nmore"), (A, "a")]),
    ("transcript", {"text": "Ann: a\nBo: b\nAnn: c\nBo: d"}, [(U, "a"), (A, "b"), (U, "c"), (A, "d")]),
    (
        "chatml",
        chat((U, [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), (A, "c")),
        [(U, "a\nb"), (A, "c")],
    ),
    (
        "sharegpt",
        {"conversations": '[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]'},
        [(U, "a"), (A, "b")],
    ),
]


@pytest.mark.parametrize(("name", "record", "turns"), FORMATS)
def test_formats(name: str, record: Any, turns: list[tuple[str, str]], tmp_path: Path) -> None:
    """Each signature is recognised and mapped by its rule."""
    outcome = records(tmp_path, record)
    assert outcome.format == name
    assert outcome.turns() == turns


@pytest.mark.parametrize(
    ("record", "flag"),
    [
        (FORMATS[9][1], "W_PREFERENCE"),
        (FORMATS[12][1], "W_UNCLOSED"),
        (chat((A, "a"), (U, "b")), "W_STARTS_ASSISTANT"),
        ({"conversations": [{"role": "user", "content": "a", "from": "human", "value": "x"}]}, "W_MIXED_KEYS"),
    ],
)
def test_warnings(record: Any, flag: str, tmp_path: Path) -> None:
    """What is kept but odd carries its warning."""
    assert records(tmp_path, record).conversations[0]["flags"] == [flag]


@pytest.mark.parametrize(
    ("record", "sure"), [(["a", "b"], 0.5), (FORMATS[3][1], 0.5), (FORMATS[14][1], 0.5), (HI, 1.0)]
)
def test_role_confidence(record: Any, sure: float, tmp_path: Path) -> None:
    """Roles that were only inferred from the order say so."""
    assert records(tmp_path, record).conversations[0]["source"]["role_confidence"] == sure


@pytest.mark.parametrize(
    ("record", "code", "message"),
    [
        (chat((U, 5)), "E_CONTENT_TYPE", "row 1, message 0: content is number, expected text"),
        (chat((U, [{"type": "image_url"}])), "E_CONTENT_TYPE", "row 1, message 0: content part is not text"),
        ({"messages": []}, "E_NO_MESSAGES", "row 1: no messages"),
        (chat((U, "a"), (None, "b")), "E_ROLE", "row 1, message 1: unknown role null"),  # type: ignore[arg-type]  # the fault
        (
            {"text": "x" * 501 + "\nHuman: a\nAssistant: b"},
            "E_LEADING_TEXT",
            "row 1: 501 characters before the first label",
        ),
        ({"n": 1}, "E_FORMAT_UNKNOWN", "row 1: no known signature"),
        (
            {"question": "q", "query": "r", "answer": "a"},
            "E_AMBIGUOUS_COLUMNS",
            "row 1: several columns fit (question, query, answer); give a mapping of user and assistant",
        ),
        ({"messages": "[1, "}, "E_JSON", "row 1: column messages is not valid JSON"),
    ],
)
def test_rejected_records(record: Any, code: str, message: str, tmp_path: Path) -> None:
    """A record that no rule can map goes aside with its code and place; the others stay."""
    many = [HI] * 12
    outcome = records(tmp_path, HI, record, *many)
    assert len(outcome.conversations) == 13
    assert [(row["row"], row["code"], row["message"]) for row in outcome.quarantine] == [(1, code, message)]


def test_blank_content_is_left_for_validation(tmp_path: Path) -> None:
    """Blank and null contents are mapped; whether they may stay is for the next stage to say."""
    outcome = records(tmp_path, {"question": "", "answer": "a"}, {"question": "q", "answer": None})
    assert [outcome.turns(0), outcome.turns(1)] == [[(U, ""), (A, "a")], [(U, "q"), (A, "")]]


def test_unmapped_fields_are_kept(tmp_path: Path) -> None:
    """Everything no rule used is in meta as canonical JSON, fields of single messages included."""
    record = chat((U, "a"), (A, "b"), id="k", zeta=[1, {"b": None}], alpha="ä", labels={"risk": "low", "n": 2})
    record["messages"][0] |= {"name": "Ann", "timestamp": 5, "weight": 0}
    (item,) = records(tmp_path, record).conversations
    assert item["id"] == "k"
    assert item["meta"] == '{"alpha":"ä","message_fields":{"0":{"weight":0}},"zeta":[1,{"b":null}]}'
    assert item["labels"] == [{"key": "n", "value": "2"}, {"key": "risk", "value": "low"}]
    assert item["messages"][0] == {"role": U, "content": "a", "name": "Ann", "ts": "5"}


def test_text_is_nfc_with_lf(tmp_path: Path) -> None:
    """Content is normalised to NFC and LF and otherwise left alone."""
    assert records(tmp_path, chat((U, " e\u0301\r\nx\ry "), (A, "b"))).turns()[0] == (U, " \u00e9\nx\ny ")


def test_ids(tmp_path: Path) -> None:
    """A source id is taken, a repeated one gets its row, a missing or blank one is the digest of the messages."""
    turns = chat((U, "a"), (A, "b"))
    outcome = records(tmp_path, turns | {"id": "x"}, turns | {"id": "x"}, turns | {"id": " "}, turns, turns | {"id": 0})
    ids = [item["id"] for item in outcome.conversations]
    assert ids[:2] == ["x", "x-1"]
    assert ids[2] == ids[3] == "58c68143b1c15ac5c37077014b8d2c99"
    assert ids[4] == "0"
    assert [item["flags"] for item in outcome.conversations] == [[], ["W_DUPLICATE_ID"], [], [], []]


def test_long_table(tmp_path: Path) -> None:
    """One row per turn: grouped and sorted by turn, in any row order, over any number of partitions."""
    rows = [
        {"conversation_id": f"c{number % 40}", "turn": number // 40, "speaker": ("client", "therapist")[number // 40 % 2],
         "text": f"t{number}", "site": "north", "mood": number // 40}
        for number in reversed(range(160))
    ]  # fmt: skip
    outcome = records(tmp_path, *rows, partition_bytes=2000)
    assert outcome.format == "long_table"
    assert len(outcome.ingested.partitions) > 2
    assert len(outcome.conversations) == 40
    assert outcome.merged == 120
    by_id = {item["id"]: item for item in outcome.conversations}
    assert [message["content"] for message in by_id["c7"]["messages"]] == ["t7", "t47", "t87", "t127"]
    assert [message["role"] for message in by_id["c7"]["messages"]] == [U, A, U, A]
    assert by_id["c7"]["meta"] == '{"mood":[0,1,2,3],"site":"north"}'
    assert by_id["c7"]["flags"] == []


def test_long_table_without_numbers(tmp_path: Path) -> None:
    """Without turn numbers the file's order holds, with a warning; a bad turn takes only its conversation."""
    data = b"session_id,role,content\n1,user,a\n2,user,b\n1,assistant,c\n2,wizard,d\n"
    outcome = run(data, tmp_path, "table.csv")
    assert outcome.turns() == [(U, "a"), (A, "c")]
    assert outcome.conversations[0]["flags"] == ["W_ORDER"]
    assert [(row["row"], row["code"]) for row in outcome.quarantine] == [(3, "E_ROLE")]


def test_vicuna_needs_the_evidence_of_ids(tmp_path: Path) -> None:
    """Vicuna is reported as a subformat of ShareGPT only where ids prove it."""
    turns = [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]
    (tmp_path / "a").mkdir()
    with_ids = records(
        tmp_path / "a", {"id": "identity_0", "conversations": turns}, {"id": "Kx3_7", "conversations": turns}
    )
    assert (with_ids.format, with_ids.ingested.plan.subformat) == ("sharegpt", "vicuna")
    assert records(tmp_path, {"id": "q", "conversations": turns}).ingested.plan.subformat is None


def test_each_record_is_mapped_by_its_own_rule(tmp_path: Path) -> None:
    """The majority names the file; the odd record is still mapped by its own format."""
    outcome = records(tmp_path, *[HI] * 19, {"instruction": "i", "output": "o"})
    assert outcome.format == "chatml"
    assert outcome.turns(19) == [(U, "i"), (A, "o")]
    assert outcome.conversations[19]["source"]["format"] == "alpaca"


def test_a_tie_is_an_error_unless_mixed_is_asked_for(tmp_path: Path) -> None:
    """No format on 90 % of the records: the error counts what was seen and names the way out."""
    items = [HI, {"instruction": "i", "output": "o"}]
    with pytest.raises(DataError, match=r"alpaca in 1 records.*ingest\.format=mixed") as caught:
        records(tmp_path, *items)
    assert caught.value.code == "E_FORMAT_UNKNOWN"
    assert len(records(tmp_path, *items, format="mixed").conversations) == 2


def test_given_format_and_mapping(tmp_path: Path) -> None:
    """A forced format judges every record; a mapping reads the columns it names."""
    outcome = records(tmp_path, HI, {"instruction": "i", "output": "o"}, format="messages")
    assert outcome.codes() == {"E_FORMAT_UNKNOWN": 1}
    table = b"Frage;Antwort;Nr\nWas?;Das.;7\n"
    mapped = run(table, tmp_path, "t.csv", mapping={"user": "Frage", "assistant": "Antwort", "id": "Nr"})
    assert mapped.turns() == [(U, "Was?"), (A, "Das.")]
    assert (mapped.conversations[0]["id"], mapped.conversations[0]["meta"]) == ("7", "{}")
    with pytest.raises(DataError, match="no record fits the mapping to Nope"):
        run(table, tmp_path, "t.csv", mapping={"user": "Nope", "assistant": "Antwort"})


def test_ambiguous_columns_of_a_file(tmp_path: Path) -> None:
    """Several candidate columns in every record end the file, naming them."""
    with pytest.raises(DataError, match=r"\(question, query, answer\)") as caught:
        run(b"question,query,answer\na,b,c\n", tmp_path, "t.csv")
    assert caught.value.code == "E_AMBIGUOUS_COLUMNS"


TEXT = st.text(alphabet="ab \n\r:é\u0301<|", max_size=12)
WORDS = st.text(alphabet="abé ,", min_size=1, max_size=12).map(lambda text: f"x{text}x")


def mapped(record: Any) -> list[tuple[str, str]]:
    """Roles and texts by the record's own rule."""
    prepared, _ = prepare(record)
    name = recognise(prepared)
    assert name is not None
    return [(role, text) for role, text, _, _ in RULES[name](prepared).messages]


@given(turns=st.lists(st.tuples(st.sampled_from([U, A, S, "tool"]), TEXT), min_size=1, max_size=5))
def test_lists_of_turns_agree_in_every_spelling(turns: list[tuple[str, str]]) -> None:
    """The same turns give the same conversation as messages, as ShareGPT, as a bare list and packed into a cell."""
    pairs = [{"role": role, "content": text} for role, text in turns]
    shares = [{"from": role, "value": text} for role, text in turns]
    wanted = [(role, clean(text)) for role, text in turns]
    assert mapped({"messages": pairs}) == wanted
    assert mapped({"conversations": pairs}) == wanted
    assert mapped({"conversations": shares}) == wanted
    assert mapped({"conversations": json.dumps(shares)}) == wanted
    assert mapped({"conversations": repr(shares)}) == wanted
    assert mapped(pairs) == wanted
    assert mapped({"dialog": [{"speaker": role, "text": text} for role, text in turns]}) == wanted


@given(texts=st.lists(WORDS, min_size=2, max_size=6))
def test_alternating_turns_agree_in_every_spelling(texts: list[str]) -> None:
    """Alternating turns give the same conversation as strings, ChatML text, transcript and PersonaChat."""
    wanted = [(A if index % 2 else U, clean(text)) for index, text in enumerate(texts)]
    labels = [("Human", "Assistant")[index % 2] for index in range(len(texts))]
    assert mapped(texts) == wanted
    assert mapped({"text": "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))}) == wanted
    tags = "\n".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in wanted)
    assert mapped({"text": tags}) == wanted
    assert mapped({"utterances": [{"history": texts[:-1], "candidates": ["no", texts[-1]]}]}) == wanted
