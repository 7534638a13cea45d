"""The commands of the command line, one module each: arguments, run, and how the result is shown."""
