"""The worlds: data, teacher and metrics that stay fixed while methods change."""
