"""What the command ends with, but for 0."""

USER_ERROR = 2  # what the user can mend
FAILURE = 1
INTERRUPTED = 130
