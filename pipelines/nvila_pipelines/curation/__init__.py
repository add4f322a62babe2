"""`nvila curate` on a data set of one's own: processes, outputs, report."""
