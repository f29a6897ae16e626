"""What the report's page calls things: plain words for the names and codes of the report document.

A name that is not listed here is shown as it is; names may come from the data.
"""

from typing import Final

_WORDS: Final = {
    # parts of the score and what they are the mean of
    "completeness": "Completeness",
    "consistency": "Consistency",
    "diversity": "Diversity",
    "bias": "Freedom from bias",
    "duplication": "Few copies",
    "id": "has an id",
    "user": "has a user message",
    "assistant": "has an assistant message",
    "source": "source known",
    "structure_valid": "Valid structure",
    "alternation": "Roles alternate",
    "same_language": "One language",
    "confident_roles": "Roles are stated",
    "content_ok": "Clean text",
    "distinct_2": "different word pairs",
    "openings": "different openings",
    "sources": "balanced sources",
    # gates and metrics
    "overall": "Overall score",
    "residual_pii": "Rows with personal data left",
    "split_leak": "Groups of copies across splits",
    "rejected": "Share of rows set aside",
    "repetition": "Share of repetitive rows",
    "flesch": "Share of rows that are hard to read",
    # bias categories
    "gender": "Gender",
    "race_ethnicity": "Race and ethnicity",
    "age": "Age",
    "disability": "Disability",
    "religion": "Religion",
    "orientation": "Orientation",
    "socioeconomic": "Social position",
    "geographic": "Origin",
}
_CODES: Final = {
    "E_AMBIGUOUS_COLUMNS": "several columns fit",
    "E_BINARY": "not text",
    "E_CONTENT_TYPE": "content is no text",
    "E_CORRUPT": "damaged",
    "E_CSV": "not valid CSV",
    "E_EMPTY_CONTENT": "empty message",
    "E_ENCODING": "bytes not in the encoding",
    "E_FORMAT_UNKNOWN": "no known shape",
    "E_JSON": "not valid JSON",
    "E_LEADING_TEXT": "text before the first role",
    "E_NO_MESSAGES": "no messages",
    "E_RAGGED": "wrong number of fields",
    "E_ROLE": "unknown role",
    "E_ROW_TOO_LARGE": "row too large",
    "E_TRUNCATED": "file ends too early",
    "W_ALTERNATION": "a role follows itself",
    "W_CONCATENATED": "JSON values without line breaks",
    "W_CONTENT": "broken characters or markup",
    "W_DEROGATION": "derogatory statement",
    "W_DUPLICATE_ID": "id used twice",
    "W_ENCODING_MIXED": "mixed encodings",
    "W_LANGUAGE": "language not listed",
    "W_MIXED_KEYS": "mixed key names",
    "W_ORDER": "order taken from the file",
    "W_PREFERENCE": "only the preferred answer kept",
    "W_RESIDUAL_PII": "personal data left",
    "W_STARTS_ASSISTANT": "assistant speaks first",
    "W_TOO_LONG": "very long message",
    "W_UNCLOSED": "array or tag not closed",
}
RELATIONS: Final = {">=": "at least", "<=": "at most", "==": "exactly"}
SEVERITIES: Final = {"error": "✗ error", "warn": "! warning", "note": "i note"}


def label(name: str) -> str:
    """Plain words for a name of the report document; the name itself where there are none."""
    return _WORDS.get(name, name)


def coded(code: str) -> str:
    """A code with its meaning, for tables and sentences."""
    return f"{_CODES[code]} ({code})" if code in _CODES else code
