"""A small model in the place of the reader's, as the command line's tests have it."""

from tests.cli.conftest import shipped

__all__ = ["shipped"]
