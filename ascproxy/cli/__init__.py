"""The command line: composes the processes, and says what to do when something is wrong."""
