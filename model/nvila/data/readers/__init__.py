"""Readers: common data set formats as one stream of records, in a fixed order, never all in memory."""
