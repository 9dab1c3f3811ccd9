"""The words of llem-ray: frozen types, errors, units, clock, plug-in loader. No I/O."""
