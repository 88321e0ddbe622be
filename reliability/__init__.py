"""What may be relied on, put to the test: `python -m reliability kill | mutate | soak`."""
