"""`mep compare`: methods x subjects x seeds, each cell a run of its own, and one table and page of all of them."""
