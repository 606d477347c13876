"""What extraction costs beside the teachers' own forward; see README.md."""
