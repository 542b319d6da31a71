"""The program behind the scripts of ``tools``: command lines, checks, the launcher."""
