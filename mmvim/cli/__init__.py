"""The program behind the scripts of ``tools``: command lines, checks and the launcher."""
