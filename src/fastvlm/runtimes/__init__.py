"""Runtimes beside torch, behind `SplitDecoder`."""
