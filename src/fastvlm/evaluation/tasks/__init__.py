"""Tasks run with every strategy on the same images: quality and speed, and their report."""
