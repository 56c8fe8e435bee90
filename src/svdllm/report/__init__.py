"""Records made readable: tables, cards."""
