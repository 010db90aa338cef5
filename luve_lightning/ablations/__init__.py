"""The paper's tables, repeated: what is run for each row, the runs, and the table that comes of them."""
