"""Families whose decoders are not of the usual form, each a small class."""
