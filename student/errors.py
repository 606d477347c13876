"""What a user can mend in a recipe, a checkpoint or a dataset. One line each: the value, the rule, the remedy."""


class StudentError(Exception):
    """Base of every error raised by `olavlm.student` for the user."""


class RecipeError(StudentError, ValueError):
    """A recipe key or value that cannot be used."""


class RecipeFileError(StudentError, ValueError):
    """A recipe file that is missing, or no YAML."""


class ModelError(StudentError, ValueError):
    """A model folder, hub id or checkpoint that cannot be used."""


class SampleError(StudentError, ValueError):
    """A sample that cannot be turned into a prompt with exact labels."""


class TargetsError(StudentError, ValueError):
    """Features in a store, distillation targets or the base encoder's, that are missing or do not fit the recipe."""


class TrainingError(StudentError, RuntimeError):
    """Training that cannot go on."""
