"""Who is calling: credentials to principals. Decides nothing about what they may do."""
