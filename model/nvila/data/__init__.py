"""Records, readers, mixtures, packing and collation."""
