"""The scripts of `benchmarks/` on small models, from their command lines to what they write."""
