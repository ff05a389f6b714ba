"""Many runs, one table: a study trains the rows that a TOML file names, and says what they show."""
