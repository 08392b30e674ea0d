"""Writes the figures and puts them into the lessons: python -m lab.pages.figures

A figure goes between `<!-- figure NAME -->` and `<!-- end -->`. A test fails if a file or a page is not up to
date.
"""

from lab.pages.figures import gallery

if __name__ == "__main__":
    for path, text in {**gallery.files(), **gallery.pages()}.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
