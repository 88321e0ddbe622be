"""What explains the others: single experiments, without options."""
