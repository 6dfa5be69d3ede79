"""What an operator sees of a running node: metric pages, their exposition, and log lines."""
