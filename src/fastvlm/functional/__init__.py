"""Pure functions, and the errors that every other module raises; needs torch only."""
