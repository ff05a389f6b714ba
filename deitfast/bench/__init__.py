"""`deitfast bench`: what every stage of training can do, which one holds the run back, and what would lift it."""
