"""A sound project, and tasks and networks that are broken in one place each."""
