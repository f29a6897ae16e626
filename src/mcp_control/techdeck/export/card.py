"""The data card: README.md with the YAML front matter of the Hugging Face hub, made from the manifest alone.

Source: Hugging Face hub documentation, "Dataset cards" (fields language, size_categories, configs).
"""

from typing import Any

import yaml

_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
)
_LAYOUT = {
    "chatml": "`messages` is a list of `{role, content}`; roles are system, user, assistant, tool.",
    "sharegpt": "`conversations` is a list of `{from, value}`; `from` is system, human, gpt or tool.",
    "alpaca": "`instruction` is the last question, `output` its answer, `history` the pairs before, `system` the prompt.",
}


def size_category(rows: int) -> str:
    """The hub's size class of a data set."""
    return next((name for limit, name in _SIZES if rows < limit), "n>100M")


def card(manifest: dict[str, Any]) -> str:
    """The card's text."""
    rows = sum(file["rows"] for file in manifest["files"])
    front = {
        "pretty_name": _plain(manifest["dataset"]["file"]),
        "language": [item["name"] for item in manifest["languages"] if item["name"] != "und"] or ["und"],
        "license": "unknown",
        "task_categories": ["text-generation"],
        "size_categories": [size_category(rows)],
        "tags": ["conversational", manifest["format"]],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": file["split"], "path": file["name"]} for file in manifest["files"] if file["rows"]
                ],
            }
        ],
    }
    files = "\n".join(
        f"| `{file['name']}` | {file['split']} | {file['rows']:,} | {file['bytes']:,} | `{file['sha256']}` |"
        for file in manifest["files"]
    )
    stages = "\n".join(
        f"| {stage['name']} | {stage['rows_in']:,} | {stage['rows_out']:,} | {stage['rejected']:,} |"
        for stage in manifest["stages"]
    )
    score = manifest["quality"]["score"]
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n# {_plain(manifest['dataset']['file'])}\n\n"
        f"{rows:,} conversations from `{_plain(manifest['dataset']['file'])}` "
        f"(SHA-256 `{manifest['dataset']['sha256']}`), written as {manifest['format']} in {manifest['container']}.\n\n"
        f"## Layout\n\n{_LAYOUT[manifest['format']]} Every row also has `id`, `language`, `tokens` "
        f"({manifest['tokenizer']}), and `labels` and `meta` as JSON text.\n\n"
        "## Files\n\n| file | split | rows | bytes | SHA-256 |\n| --- | --- | --- | --- | --- |\n"
        f"{files}\n\n"
        "Copies are left out: one conversation of each group is kept, and no group lies in two splits "
        f"(seed {manifest['options']['process']['seed']}).\n\n"
        f"## Rows\n\n| stage | in | out | rejected |\n| --- | --- | --- | --- |\n{stages}\n\n"
        f"{manifest['counts']['duplicates']:,} copies, {manifest['counts']['not_representable']:,} conversations that the "
        f"format cannot express, {manifest['counts']['trimmed']:,} without their last unanswered question.\n\n"
        f"## Quality\n\nOverall score {'not assessed' if score is None else f'{score:.4f}'}, gate "
        f"{manifest['quality']['gate']}. Personal data "
        f"{'was replaced by placeholders' if manifest['options']['validate']['redact'] else 'was not removed'} where "
        "patterns find it; names without a context pattern are not found. Implicit bias, irony, languages other than "
        "English and coded words are not assessed.\n"
    )


def _plain(text: str) -> str:
    """Text of the data, safe inside Markdown: no markup, no line breaks."""
    return "".join(character if character.isalnum() or character in " ._-()+," else "_" for character in text)
