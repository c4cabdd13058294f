"""The report of examples/demo.py: what is shown to the models, what they say, and how it is put on a page."""
