"""A local web page on which teachers and student draw side by side."""
