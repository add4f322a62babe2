"""Pipeline graphs: they only wire components."""
