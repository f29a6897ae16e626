"""The structure and content tiers: roles, alternation, broken characters, length, language of the turns.

All of it is polars over one row per message; Python sees only texts with a mark of mis-decoding.
Source: design of techdeck, section 3 (structure_valid, alternation, content_ok).
"""

import ftfy
import polars as pl

ROLES = ("system", "user", "assistant", "tool")
BROKEN = r"[\x00-\x08\x0B-\x1F\x7F-\x{9F}\x{FFFD}]"
TAGS = r"<\|im_|\[/?INST\]"
MOJIBAKE = r"Ã|â€"
_LETTERS = 20
_ENOUGH_LETTERS = rf"(?:[A-Za-z][^A-Za-z]*){{{_LETTERS}}}"
_DENSE = ("ja", "zh", "ko")  # a sentence has few characters
_SCRIPTS = (
    ("ja", r"[\p{Hiragana}\p{Katakana}]"),
    ("zh", r"\p{Han}"),
    ("ko", r"\p{Hangul}"),
    ("ru", r"\p{Cyrillic}"),
    ("ar", r"\p{Arabic}"),
    ("he", r"\p{Hebrew}"),
    ("el", r"\p{Greek}"),
    ("hi", r"\p{Devanagari}"),
    ("th", r"\p{Thai}"),
)
"""A script stands for its most spoken language; this is no identification, only a check that turns belong together."""
_ENGLISH = (
    "the and you to of that is it for my your are have with but not this was be what i me so if can do he she they"
    " we on or as at about don't i'm it's when how would will just"
)
_LATIN = (
    ("es", "el los las que y en una por con para es pero muy está estoy mi como su más ser"),
    ("fr", "le les des et est je ne pas que une dans pour avec mais vous suis c'est très mon j'ai"),
    ("de", "der das und ist ich nicht ein eine mit für auf aber wie sie mich sich habe bin zu mein"),
    ("pt", "os que em uma para com não minha mas muito está estou eu você é meu isso mais"),
    ("it", "il gli che di una per con non mi mia ma molto sono ho è della anche più mio"),
    ("nl", "het een en ik niet dat voor maar mijn zijn heb ook je wat ben naar te bij"),
)
_SURE = 0.2  # of the words: English prose has about 0.4 of its words in the list, other prose almost none
_LANGUAGE_SHARE = 0.12
_HEAD = 240  # characters looked at per turn: about forty words


def _count_words(words: str) -> pl.Expr:
    alternatives = "|".join(words.split())
    edge = r"(?-u:\b)" if words.isascii() else r"\b"  # the ASCII one is twice as fast
    return pl.col("_head").str.count_matches(rf"(?i){edge}(?:{alternatives}){edge}")


def turn_language(turns: pl.DataFrame) -> pl.Series:
    """Language code of each turn's first 240 characters; null below 20 letters or where no rule is sure.

    Counts function words (seven Latin-script languages) or takes the script. Made to compare turns with each other.
    """
    heads = turns.select(pl.col("content").str.slice(0, _HEAD).alias("_head")).with_row_index("_at")
    words = pl.col("_head").str.count_matches(" ", literal=True) + 1
    first = heads.with_columns(
        ((_count_words(_ENGLISH) >= _SURE * words) & pl.col("_head").str.contains(_ENOUGH_LETTERS))
        .fill_null(value=False)
        .alias("_english")
    )
    languages = [("en", _ENGLISH), *_LATIN]
    other = (
        first.filter(~pl.col("_english") & pl.col("_head").is_not_null())
        .with_columns(_count_words(listed).alias(f"_{code}") for code, listed in languages)
        .with_columns(pl.max_horizontal(f"_{code}" for code, _ in languages).alias("_best"))
    )
    scripts = [
        pl.when(pl.col("_head").str.count_matches(pattern) >= (8 if code in _DENSE else _LETTERS)).then(pl.lit(code))
        for code, pattern in _SCRIPTS
    ]
    sure = (pl.col("_best") >= _LANGUAGE_SHARE * words) & (pl.col("_best") >= 2)
    latin = pl.when(pl.col("_head").str.contains(rf"(?:\p{{Latin}}[^\p{{Latin}}]*){{{_LETTERS}}}") & sure).then(
        pl.coalesce(pl.when(pl.col(f"_{code}") == pl.col("_best")).then(pl.lit(code)) for code, _ in languages)
    )
    decided = other.select("_at", pl.coalesce(*scripts, latin).alias("_code"))
    return (
        first.select("_at", pl.when("_english").then(pl.lit("en")).alias("_en"))
        .join(decided, on="_at", how="left", maintain_order="left")
        .select(pl.coalesce("_en", "_code").alias("language"))
        .to_series()
    )


def is_mojibake(text: str) -> bool:
    """Whether the text is UTF-8 that was read as another encoding: ftfy would decode it differently."""
    return ftfy.fix_encoding(text) != text


def check_turns(turns: pl.DataFrame, max_chars: int) -> pl.DataFrame:
    """Add `blank`, `broken`, `long` and `language` to a frame with one row per message (`role`, `content`)."""
    checked = turns.with_columns(
        (pl.col("content").is_null() | ~pl.col("content").str.contains(r"\S")).alias("blank"),
        (pl.col("content").str.contains(BROKEN) | pl.col("content").str.contains(TAGS))
        .fill_null(value=False)
        .alias("broken"),
        (pl.col("content").str.len_chars() > max_chars).fill_null(value=False).alias("long"),
        pl.col("content").str.contains(MOJIBAKE).fill_null(value=False).alias("_suspect"),
        turn_language(turns),
    )
    if checked["_suspect"].any():
        suspects = checked["_suspect"].arg_true()
        texts = checked["content"].gather(suspects)
        verdict = pl.Series([is_mojibake(text) for text in texts], dtype=pl.Boolean)
        checked = checked.with_columns(
            checked["broken"].scatter(suspects, checked["broken"].gather(suspects) | verdict)
        )
    return checked.drop("_suspect")


def by_conversation(turns: pl.DataFrame, rows: int) -> pl.DataFrame:
    """Sums of the structure tier for conversations 0..rows-1, in order; `turns` comes from `check_turns` with `at`.

    Columns: roles seen, blank turns, `adjacent_pairs` of non-system messages and those of the same role
    (`same_role_pairs`; neighbouring tool results are not counted), `content_ok`, `too_long` turns, the most frequent
    `language` (first seen wins a tie), turns with a language and those in the conversation's own.
    """
    spoken = turns.lazy().filter(pl.col("role") != "system")
    pairs = (
        spoken.select(
            "at",
            (pl.col("at") == pl.col("at").shift(1)).alias("pair"),
            ((pl.col("role") == pl.col("role").shift(1)) & (pl.col("role") != "tool")).alias("same"),
        )
        .filter(pl.col("pair"))
        .group_by("at")
        .agg(
            pl.len().cast(pl.Int32).alias("adjacent_pairs"),
            pl.col("same").sum().cast(pl.Int32).alias("same_role_pairs"),
        )
    )
    base = (
        turns.lazy()
        .group_by("at")
        .agg(
            (pl.col("role") == "user").sum().alias("users"),
            (pl.col("role") == "assistant").sum().alias("assistants"),
            (~pl.col("role").is_in(ROLES).fill_null(value=False)).sum().alias("unknown_roles"),
            (pl.col("blank") & pl.col("role").is_in(["user", "assistant"])).sum().alias("blanks"),
            (~pl.col("broken").any()).alias("content_ok"),
            pl.col("long").sum().cast(pl.Int32).alias("too_long"),
        )
    )
    votes = (
        turns.lazy()
        .with_row_index("_turn")
        .filter(pl.col("language").is_not_null() & pl.col("role").is_in(["user", "assistant"]))
        .group_by("at", "language")
        .agg(pl.len().alias("votes"), pl.col("_turn").min().alias("seen"))
        .sort("at", "votes", "seen", descending=[False, True, False])
        .group_by("at", maintain_order=True)
        .agg(
            pl.col("language").first(),
            pl.col("votes").sum().cast(pl.Int32).alias("language_turns"),
            pl.col("votes").first().cast(pl.Int32).alias("same_language_turns"),
        )
    )
    return (
        pl.LazyFrame({"at": pl.int_range(rows, eager=True, dtype=pl.UInt32)})
        .join(base, on="at", how="left", maintain_order="left")
        .join(pairs, on="at", how="left", maintain_order="left")
        .join(votes, on="at", how="left", maintain_order="left")
        .with_columns(
            pl.col(
                "users",
                "assistants",
                "unknown_roles",
                "blanks",
                "too_long",
                "adjacent_pairs",
                "same_role_pairs",
                "language_turns",
                "same_language_turns",
            ).fill_null(0),
            pl.col("content_ok").fill_null(value=True),
        )
        .collect()
    )
