"""The course as a web site without a server: python -m lab.pages.site."""
