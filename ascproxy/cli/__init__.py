"""The command line, one module a command: it composes the processes, and is imported by none of them."""
