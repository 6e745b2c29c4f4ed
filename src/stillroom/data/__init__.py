"""Where images and points come from: shipped sets, folders, arrays."""
