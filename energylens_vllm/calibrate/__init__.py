"""Profiles from measurements: recordings and their replay, microbenchmarks and fits, online correction."""
