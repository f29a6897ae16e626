"""Only the rows that an earlier run of the same input set aside, at whatever stage."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl
from msgspec.structs import replace

from mcp_control.techdeck.model import Ingested, write_parquet


def only_rejected(found: Ingested, aside: Sequence[Path]) -> Ingested:
    """Keep the rows that the quarantine files `aside` name, in partitions and in the quarantine of this reading.

    Rows are told by their place in the input, so the same input and the same files give the same bytes.
    """
    rows = pl.concat([pl.scan_parquet(path).select("row") for path in aside]).unique().collect() if aside else _NONE
    partitions = []
    for part in found.partitions:
        kept = pl.read_parquet(part.path).join(rows, on="row", how="semi", maintain_order="left")
        if kept.height:
            write_parquet(kept, part.path)
            partitions.append(replace(part, rows=kept.height))
    quarantine, rejected, codes = found.quarantine, 0, dict[str, int]()
    if found.quarantine is not None:
        kept = pl.read_parquet(found.quarantine).join(rows, on="row", how="semi", maintain_order="left")
        rejected = kept.height
        codes = {str(code): int(count) for code, count in sorted(kept["code"].value_counts().iter_rows())}
        write_parquet(kept, found.quarantine)
        quarantine = found.quarantine if rejected else None
    rows_out = sum(part.rows for part in partitions)
    return replace(
        found,
        partitions=partitions,
        quarantine=quarantine,
        rows_in=rows_out + rejected,
        rows_out=rows_out,
        rejected=rejected,
        rejected_by_code=codes,
    )


_NONE = pl.DataFrame(schema={"row": pl.Int64()})
