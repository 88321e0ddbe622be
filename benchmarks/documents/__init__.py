"""What docs/ shows of benchmarks/results: tables, the papers' beside them, plots and sheets of pictures."""
