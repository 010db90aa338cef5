"""The paper's tables, repeated: what runs for each row, the runs, and the resulting table."""
