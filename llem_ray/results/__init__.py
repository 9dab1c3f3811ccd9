"""The run directory: Arrow schemas, journal, atomic writer, reader, resume."""
