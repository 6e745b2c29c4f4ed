"""Networks that no library ships, and adapters that turn library modules into denoisers."""
