"""Stage 5: scores of the whole data set, hard gates, recommendations and the report."""
