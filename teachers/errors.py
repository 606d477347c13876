"""What goes wrong with a teacher and can be mended by the user."""

from __future__ import annotations


class TeacherError(ValueError):
    """A teacher cannot be named, loaded or used as asked. One line: the value, the rule, the remedy."""
