"""Tasks run with every strategy on the same pictures: quality and speed, and their report."""
