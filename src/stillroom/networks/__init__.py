"""Networks that no library ships, and the fixed parts that they stand between."""
