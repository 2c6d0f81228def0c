"""fastvlm beside other engines: their environments, their workers, rounds and report."""
