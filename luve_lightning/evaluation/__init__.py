"""Methods compared, their cost, tables and pictures."""
