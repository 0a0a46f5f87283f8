"""Many jobs from one file: what its members are, how far each is, and running them (`python -m mpifed sweep`)."""
