"""The generated parts of the lessons and the documents."""
