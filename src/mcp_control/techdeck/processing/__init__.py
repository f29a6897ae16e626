"""Stage 4: enrichment per partition, then duplicates and splits over the whole data set."""
