"""Features to the backbone's width, values to tokens; one adapter per file, none imported here."""
