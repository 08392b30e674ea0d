"""The generated parts of the front page, the lessons and docs/."""
