"""Asking about each image of a large collection, resumably, part by part."""
