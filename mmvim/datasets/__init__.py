"""Data sets and data generation; the mm libraries' own loaders read what is written here."""
