"""Suites of trained cells: methods on subjects of the tiny world, from seeds."""
