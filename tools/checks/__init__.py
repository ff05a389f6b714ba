"""What tools/parity compares, group by group."""
