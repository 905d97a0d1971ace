"""Published approaches, each against its reference."""
